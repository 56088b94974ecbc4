"""Is the text the same with heads, without, alone, in a batch, after preemption and with the prefix cache?

    python -m tests.bench.lossless MODEL --heads DIR [--prompts 50] [--tokens 128]

Runs the engine in this process and prints, for each way of running, how many of the texts differ from the reference:
transformers' own `generate` for greedy decoding, our plain decoding for sampling. A difference is explained by the gap
between the two best scores at the first token that differs: rounding can decide only where the gap is tiny. Exit code 1
if one text in 50 or more differs, or if a difference has a gap above `NEAR_TIE`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.backbone import Backbone
from models.checkpoint import load_heads
from models.sampling import gumbel_from_keys, noise_key
from models.source import DEFAULT_HEADS, resolve
from server.engine.core import Engine
from server.engine.messages import EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.runner import Runner

PROMPTS = Path(__file__).parent / "lossless.txt"
NEAR_TIE = 1e-3  # logits; fp32 sums in another order differ by about 1e-4

PLENTY = 16_384  # KV tokens for all requests at once

Texts = list[list[int]]


@dataclass(frozen=True)
class Way:
    """One way to run the same requests."""

    name: str
    speculate: bool
    at_a_time: int
    prefix_cache: bool = True
    kv_cache_tokens: int = PLENTY


def greedy_ways(small_pool: int) -> list[Way]:
    return [
        Way("heads off, alone", False, 1),
        Way("heads on, alone", True, 1),
        Way("heads off, 8 at a time", False, 8),
        Way("heads on, 8 at a time", True, 8),
        Way("heads on, 8 at a time, small pool", True, 8, kv_cache_tokens=small_pool),
    ]


SAMPLED_WAYS = [
    Way("heads off, alone, no prefix cache", False, 1, prefix_cache=False),
    Way("heads on, alone, prefix cache", True, 1),
    Way("heads off, 8 at a time, prefix cache", False, 8),
    Way("heads on, 8 at a time, no prefix cache", True, 8, prefix_cache=False),
    Way("heads on, 8 at a time, prefix cache", True, 8),
]


class Bench:
    """The loaded model, run in different ways over the same prompts."""

    def __init__(self, model: Path, heads: Path, num_prompts: int) -> None:
        self.model = model
        self.backbone = Backbone.load(model, dtype=torch.float32, device=torch.device("cpu"))
        weight = self.backbone.lm_head_weight
        self.heads = load_heads(heads, weight, dtype=torch.float32, device=weight.device)
        tokenizer = AutoTokenizer.from_pretrained(model)
        lines = PROMPTS.read_text().splitlines()[:num_prompts]
        chats = [[{"role": "user", "content": line}] for line in lines]
        self.prompts: Texts = [
            list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
            for chat in chats
        ]

    def generate(self, num_tokens: int) -> Texts:
        """What transformers generates, greedily, one prompt at a time, on its own attention."""
        plain = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        texts = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = plain.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
            texts.append(out[0, len(prompt) :].tolist())
        return texts

    def run(self, way: Way, sampling: SamplingParams) -> tuple[Texts, str]:
        """The texts, and a note on how the engine ran. A small pool that preempts nobody would show nothing."""
        config = EngineConfig(
            str(self.model),
            max_num_seqs=way.at_a_time,
            prefix_cache=way.prefix_cache,
            kv_cache_tokens=way.kv_cache_tokens,
            max_model_len=min(1024, way.kv_cache_tokens),
        )
        engine = Engine(config, Runner(self.backbone, self.heads, config))
        mode = SpeculationParams("lossless" if way.speculate else "off")
        texts: Texts = [[] for _ in self.prompts]
        for i, prompt in enumerate(self.prompts):
            engine.submit(Submit(str(i), tuple(prompt), replace(sampling, seed=sampling.seed + i), mode))
        preemptions = steps = drafts = accepted = 0
        while engine.has_work:
            output = engine.step()
            steps += 1
            preemptions += output.stats.num_preemptions
            drafts += output.stats.num_drafts
            accepted += output.stats.num_accepted_tokens
            for delta in output.deltas:
                texts[int(delta.request_id)].extend(delta.token_ids)
        assert preemptions or way.kv_cache_tokens >= PLENTY, "the small pool was large enough for everybody"
        tau = f"tau {1 + accepted / drafts:.2f}" if drafts else "no drafts"
        return texts, f"{steps} steps, {tau}, {preemptions} preemptions"

    def gap(self, prompt: list[int], ours: list[int], reference: list[int], sampling: SamplingParams) -> float:
        """Difference in score of the two candidates at the first place where the texts part, noise included."""
        place = next((i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b), None)
        if place is None:  # one is the beginning of the other: no rounding explains that
            return float("inf")
        candidates = torch.tensor([reference[place], ours[place]])
        plain = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        with torch.inference_mode():
            scores = plain(torch.tensor([prompt + reference[:place]])).logits[0, -1][candidates]
        if sampling.temperature > 0:
            key = noise_key(sampling.seed, sampling.choice, len(prompt) + place)
            scores = scores / sampling.temperature + gumbel_from_keys([key], candidates)[0]
        return float(scores[0] - scores[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--heads", type=Path, default=DEFAULT_HEADS)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    bench = Bench(resolve(options.model), options.heads, options.prompts)
    console = Console(width=140)
    small_pool = 2 * (max(map(len, bench.prompts)) + options.tokens) + 32
    greedy = SamplingParams(options.tokens, temperature=0)
    started = monotonic()
    reference = bench.generate(options.tokens)
    console.print(f"transformers generate: {monotonic() - started:.0f} s, {sum(map(len, reference))} tokens")
    good = compare(console, bench, "greedy, against transformers generate", greedy, greedy_ways(small_pool), reference)
    sampled = SamplingParams(options.tokens, temperature=0.8, top_p=0.95, seed=1000)
    plain, _ = bench.run(SAMPLED_WAYS[0], sampled)
    title = "temperature 0.8, top_p 0.95, fixed seeds, against plain decoding"
    return 0 if compare(console, bench, title, sampled, SAMPLED_WAYS[1:], plain) and good else 1


def compare(
    console: Console, bench: Bench, title: str, sampling: SamplingParams, ways: list[Way], reference: Texts
) -> bool:
    """Run all ways and print a line each. True if the differences are few and explained."""
    table = Table("way", "texts that differ", "gaps at the first difference", "seconds", "engine", title=title)
    good = True
    for way in ways:
        started = monotonic()
        texts, note = bench.run(way, sampling)
        seconds = monotonic() - started
        gaps = [
            bench.gap(prompt, ours, ref, replace(sampling, seed=sampling.seed + i))
            for i, (prompt, ours, ref) in enumerate(zip(bench.prompts, texts, reference, strict=True))
            if ours != ref
        ]
        good = good and len(gaps) * 50 < len(texts) and all(abs(gap) < NEAR_TIE for gap in gaps)
        shown = ", ".join(f"{gap:.1e}" for gap in gaps)
        table.add_row(way.name, f"{len(gaps)} of {len(texts)}", shown, f"{seconds:.0f}", note)
    console.print(table)
    return good


if __name__ == "__main__":
    sys.exit(main())
