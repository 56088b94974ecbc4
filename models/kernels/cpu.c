/* What Python calls (models.kernels.cpu): linear layers, attention, a whole model of the common shape, a drafter's trees,
 * and drawing.
 *
 * Each call is one parallel region; its threads go through the stages together. Buffers are the caller's, none is kept.
 */
#include <omp.h>

#include "attention.h"
#include "draft.h"
#include "draw.h"
#include "linear.h"

#define PANEL 128  /* rows whose quantised values stay in the second-level cache */
#define PIECES 2   /* of work in a stage for each thread, if there is so little */
#define LONGEST 64 /* blocks of one piece of work: memory is read fastest in long runs */

/* One decoder layer of the common shape: RMSNorm, rotary attention, RMSNorm, SwiGLU. */
typedef struct {
    Linear qkv, out, gate_up, down; /* gate_up: blocks of 16 outputs of the gate and of the up projection in turn */
    const float *input_norm, *post_norm; /* [hidden] */
    const float *q_norm, *k_norm;        /* [head_dim] or null */
    float epsilon;
    int32_t is_rotary;
    Attention attention;
} Layer;

/* A whole model: embedding, layers, norm, output embedding. */
typedef struct {
    const Layer *layers;
    int64_t num_layers;
    Linear embedding;         /* of 8 bits, [vocab][hidden]; the head's weights if the model ties them */
    const float *norm;        /* [hidden] */
    Linear head;
    const float *cos, *sin;   /* [positions][rotary_dim] */
    int64_t rotary_dim;
    const int64_t *shown;     /* layers whose outputs are kept, too */
    int64_t num_shown;
} Trunk;

/* A sequential drafter: one layer, and what enters it, [norm(embedding); norm(state)] times a weight. */
typedef struct {
    Trunk trunk;
    Linear input;
    const float *token_norm, *state_norm; /* [hidden] */
} Drafter;

/* What a step works on. */
typedef struct {
    float *hidden;   /* [rows][hidden]: the residual stream */
    float *qkv;      /* [rows][(heads + 2 kv_heads) * dim] */
    float *query;    /* [rows][heads * dim] */
    float *attended; /* [rows][heads * dim] */
    float *inner;    /* [rows][intermediate] */
    Rows narrow;     /* quantised; as wide as the widest input */
    Rows between;    /* the same of what is between gate and down, which is made while `narrow` is read */
} Buffers;

typedef enum { SET, ADD, SWIGLU } Mode;

INLINE floats silu(floats v) { return v / (1.0f + exponential(-v)); }

INLINE void put_tile(const Linear *linear, int64_t block, const Rows *rows, int64_t row, const int count, Mode mode,
                     const int bits, float *out) {
    floats v[TILE][PARTS], up[TILE][PARTS];
    block_outputs(linear, block, rows, row, count, bits, v);
    if (mode == SWIGLU) block_outputs(linear, block + 1, rows, row, count, bits, up);
    const int64_t width = mode == SWIGLU ? linear->outputs / 2 : linear->outputs;
    for (int r = 0; r < count; r++)
        for (int part = 0; part < PARTS; part++) {
            float *to = out + (row + r) * width + (mode == SWIGLU ? block / 2 : block) * BLOCK + part * LANES;
            if (mode == SET) store(to, v[r][part]);
            else if (mode == ADD) store(to, load(to) + v[r][part]);
            else store(to, silu(v[r][part]) * up[r][part]);
        }
}

INLINE void put_block(const Linear *linear, int64_t block, const Rows *rows, int64_t row, int64_t end, Mode mode,
                      const int bits, float *out) {
    for (; row + TILE <= end; row += TILE) put_tile(linear, block, rows, row, TILE, mode, bits, out);
    switch (end - row) {
        case 1: put_tile(linear, block, rows, row, 1, mode, bits, out); break;
        case 2: put_tile(linear, block, rows, row, 2, mode, bits, out); break;
        case 3: put_tile(linear, block, rows, row, 3, mode, bits, out); break;
#if TILE > 4
        case 4: put_tile(linear, block, rows, row, 4, mode, bits, out); break;
        case 5: put_tile(linear, block, rows, row, 5, mode, bits, out); break;
        case 6: put_tile(linear, block, rows, row, 6, mode, bits, out); break;
        case 7: put_tile(linear, block, rows, row, 7, mode, bits, out); break;
#endif
    }
}

/* One stage: out (or its sum with the outputs, or SwiGLU of them) for `count` rows, PANEL rows at a time. Of SwiGLU the
 * quantised values, too: `between`. */
INLINE void multiply(Team *team, const Linear *linear, const Rows *rows, int64_t count, Mode mode, float *out,
                     const Rows *between) {
    const int64_t unit = mode == SWIGLU ? 2 * GROUP / BLOCK : 1, size = PIECES * team->size; /* a group's blocks */
    const int64_t blocks = linear->outputs / BLOCK, panels = (count + PANEL - 1) / PANEL;
    const int64_t share = (blocks + size * unit - 1) / (size * unit) * unit, piece = share < LONGEST ? share : LONGEST;
    const int64_t pieces = (blocks + piece - 1) / piece;
    for (int64_t i; (i = take(team, 1)) < pieces * panels;) {
        const int64_t first = i / pieces * PANEL, end = first + PANEL < count ? first + PANEL : count;
        const int64_t start = i % pieces * piece, stop = start + piece < blocks ? start + piece : blocks;
        for (int64_t block = start; block < stop; block += mode == SWIGLU ? 2 : 1)
            if (linear->bits == 4) put_block(linear, block, rows, first, end, mode, 4, out);
            else put_block(linear, block, rows, first, end, mode, 8, out);
        for (int64_t row = first; row < end && mode == SWIGLU; row++)
            quantize(between, row, start / 2 * BLOCK, stop / 2 * BLOCK, out + row * between->inputs);
    }
    meet(team);
}

/* One stage: quantise `count` rows. */
static void narrow(Team *team, const Rows *rows, int64_t count, const float *from) {
    for (int64_t row; (row = take(team, 1)) < count;) quantize_row(rows, row, from + row * rows->inputs);
    meet(team);
}

/* x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019). */
INLINE void rms_norm(const float *x, const float *weight, int64_t dim, float epsilon, float *to) {
    floats squares = load(x) * load(x);
    for (int64_t c = LANES; c < dim; c += LANES) squares += load(x + c) * load(x + c);
    const float inverse = 1.0f / sqrtf(sum_of(squares) / dim + epsilon);
    for (int64_t c = 0; c < dim; c += LANES) store(to + c, load(x + c) * inverse * load(weight + c));
}

/* One stage: normalise and quantise `count` rows. `wide`: a row's worth of floats of this thread. */
static void norm_narrow(Team *team, const Rows *rows, int64_t count, const float *from, const float *weight,
                        float epsilon, float *wide) {
    for (int64_t row; (row = take(team, 1)) < count;) {
        rms_norm(from + row * rows->inputs, weight, rows->inputs, epsilon, wide);
        quantize_row(rows, row, wide);
    }
    meet(team);
}

/* A head's vector turned by its position (Su et al. 2021, halves as in Llama). cos, sin: [rotary_dim]. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t rotary_dim) {
    const int64_t half_dim = rotary_dim / 2;
    for (int64_t c = 0; c < half_dim; c += LANES) {
        floats low = load(x + c), high = load(x + half_dim + c);
        store(x + c, low * load(cos + c) - high * load(sin + c));
        store(x + half_dim + c, high * load(cos + half_dim + c) + low * load(sin + half_dim + c));
    }
}

INLINE void keep(const Attention *a, const void *pool, int64_t slot, int64_t kv_head, int64_t dim, const float *from) {
    const int64_t at = (slot * a->kv_heads + kv_head) * dim;
    for (int64_t c = 0; c < dim; c += LANES)
        if (a->is_half) to_half((half *)pool + at + c, load(from + c));
        else store((float *)pool + at + c, load(from + c));
}

/* One stage: normalise and rotate the heads of each row, K and V to their slots, Q to `query`. */
static void place_heads(Team *team, const Trunk *trunk, const Layer *layer, const Step *step, float *qkv, float *query) {
    const int64_t rotary_dim = trunk->rotary_dim;
    const Attention *a = &layer->attention;
    const int64_t dim = a->k_dim, heads = a->heads + 2 * a->kv_heads;
    for (int64_t row; (row = take(team, 1)) < step->rows;)
        for (int64_t head = 0; head < heads; head++) {
            float *x = qkv + (row * heads + head) * dim;
            const int is_query = head < a->heads, is_key = !is_query && head < a->heads + a->kv_heads;
            const float *norm = is_query ? layer->q_norm : is_key ? layer->k_norm : 0;
            const int64_t at = step->positions[row];
            if (norm) rms_norm(x, norm, dim, layer->epsilon, x);
            if ((is_query || is_key) && layer->is_rotary)
                rotate(x, trunk->cos + at * rotary_dim, trunk->sin + at * rotary_dim, rotary_dim);
            if (is_query) memcpy(query + (row * a->heads + head) * dim, x, dim * sizeof(float));
            else if (is_key) keep(a, a->keys, step->slots[row], head - a->heads, dim, x);
            else keep(a, a->values, step->slots[row], head - a->heads - a->kv_heads, dim, x);
        }
    meet(team);
}

static Rows as_wide(const Rows *rows, int64_t inputs) {
    Rows result = *rows;
    result.inputs = inputs;
    return result;
}

static void run_layer(Team *team, Scratch *scratch, float *wide, const Trunk *trunk, const Layer *layer,
                      const Step *step, const Buffers *b) {
    const Rows hidden = as_wide(&b->narrow, layer->qkv.inputs), attended = as_wide(&b->narrow, layer->out.inputs);
    const Rows inner = as_wide(&b->between, layer->down.inputs);
    norm_narrow(team, &hidden, step->rows, b->hidden, layer->input_norm, layer->epsilon, wide);
    multiply(team, &layer->qkv, &hidden, step->rows, SET, b->qkv, 0);
    place_heads(team, trunk, layer, step, b->qkv, b->query);
    attend(team, scratch, &layer->attention, step, b->query, b->attended, &attended);
    multiply(team, &layer->out, &attended, step->rows, ADD, b->hidden, 0);
    norm_narrow(team, &hidden, step->rows, b->hidden, layer->post_norm, layer->epsilon, wide);
    multiply(team, &layer->gate_up, &hidden, step->rows, SWIGLU, b->inner, &inner);
    multiply(team, &layer->down, &inner, step->rows, ADD, b->hidden, 0);
}

static void assemble(Team *team) {
#pragma omp single
    team->size = omp_get_num_threads(); /* may be fewer than were asked for */
}

/* Which rows of a step are asked about, and where the answers go. */
typedef struct {
    const int64_t *rows;   /* [count] */
    int64_t count;
    const int64_t *scored; /* [num_scored] indices into `rows`: those with logits; null: all */
    int64_t num_scored;
    float *kept;           /* [count][shown layers, hidden]: behind their outputs what enters the output embedding */
    float *logits;         /* [num_scored][outputs of the head] */
} Asked;

/* One stage for each time that this layer is to be shown: what came out of it, of the rows asked about. */
static void show(Team *team, const Trunk *trunk, int64_t layer, const float *hidden, const Asked *asked) {
    const int64_t size = trunk->head.inputs, width = (trunk->num_shown + 1) * size;
    for (int64_t k = 0; k < trunk->num_shown; k++) {
        if (trunk->shown[k] != layer) continue;
        for (int64_t i; (i = take(team, 1)) < asked->count;)
            memcpy(asked->kept + i * width + k * size, hidden + asked->rows[i] * size, size * sizeof(float));
        meet(team);
    }
}

/* The layers, from what is in b->hidden to the answers. */
static void run_layers(Team *team, Scratch *scratch, float *wide, const Trunk *trunk, const Step *step, const Buffers *b,
                       const Asked *asked) {
    const int64_t size = trunk->head.inputs, width = (trunk->num_shown + 1) * size;
    const Rows last = as_wide(&b->narrow, size);
    float *states = asked->kept + width - size;
    for (int64_t i = 0; i < trunk->num_layers; i++) {
        run_layer(team, scratch, wide, trunk, trunk->layers + i, step, b);
        show(team, trunk, i, b->hidden, asked);
    }
    for (int64_t i; (i = take(team, 1)) < asked->count;)
        rms_norm(b->hidden + asked->rows[i] * size, trunk->norm, size, trunk->layers->epsilon, states + i * width);
    meet(team);
    for (int64_t i; (i = take(team, 1)) < asked->num_scored;)
        quantize_row(&last, i, states + (asked->scored ? asked->scored[i] : i) * width);
    meet(team);
    multiply(team, &trunk->head, &last, asked->num_scored, SET, asked->logits, 0);
}

/* One step of the model for tokens [rows]. */
void medusa_forward(int threads, const Trunk *trunk, const Step *step, const Buffers *b, const int64_t *tokens,
                    const Asked *asked) {
    const int64_t size = trunk->head.inputs;
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        float wide[size];
        assemble(&team);
        for (int64_t row; (row = take(&team, 1)) < step->rows;)
            read_row(&trunk->embedding, tokens[row], b->hidden + row * size);
        meet(&team);
        run_layers(&team, &scratch, wide, trunk, step, b, asked);
    }
}

/* One step of a sequential drafter (models.drafters.sequential) for tokens [rows] and the states before them
 * [rows][hidden]. */
void medusa_guess(int threads, const Drafter *drafter, const Step *step, const Buffers *b, const int64_t *tokens,
                  const float *states, const Asked *asked) {
    const Trunk *trunk = &drafter->trunk;
    const int64_t size = trunk->head.inputs;
    const float epsilon = trunk->layers->epsilon;
    const Rows both = as_wide(&b->narrow, 2 * size);
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        float wide[2 * size];
        assemble(&team);
        for (int64_t row; (row = take(&team, 1)) < step->rows;) {
            read_row(&trunk->embedding, tokens[row], wide);
            rms_norm(wide, drafter->token_norm, size, epsilon, wide);
            rms_norm(states + row * size, drafter->state_norm, size, epsilon, wide + size);
            quantize_row(&both, row, wide);
        }
        meet(&team);
        multiply(&team, &drafter->input, &both, step->rows, SET, b->hidden, 0);
        run_layers(&team, &scratch, wide, trunk, step, b, asked);
    }
}

/* Of each row of scores [rows][width], of which `vocab` count, the `count` largest, best first, and their shares in the
 * softmax of the scores. */
void medusa_best(const float *scores, int64_t rows, int64_t width, int64_t vocab, int64_t count, int64_t *best,
                 float *shares) {
    enum { RUN = 4 * LANES };
    for (int64_t row = 0; row < rows; row++, scores += width, best += count, shares += count) {
        int64_t found = 0;
        for (int64_t i = 0; i < vocab; i++) {
            if (found == count && i % RUN == 0 && i + RUN <= vocab) { /* as nearly always nothing of the run is */
                floats most = load(scores + i);
                for (int64_t k = LANES; k < RUN; k += LANES) most = larger(load(scores + i + k), most);
                if (!(max_of(most) > scores[best[count - 1]])) {
                    i += RUN - 1;
                    continue;
                }
            }
            if (found == count && !(scores[i] > scores[best[count - 1]])) continue;
            int64_t place = found < count ? found++ : count - 1;
            for (; place > 0 && scores[i] > scores[best[place - 1]]; place--) best[place] = best[place - 1];
            best[place] = i;
        }
        const float most = scores[best[0]], total = mass_below(scores, 0, vocab, vocab, 1.0f, most);
        for (int64_t k = 0; k < count; k++) shares[k] = exponential(splat(scores[best[k]] - most))[0] / total;
    }
}

/* A token for each row of logits [rows][width], of which `vocab` count. */
void medusa_draw(int threads, const float *logits, int64_t rows, int64_t width, int64_t vocab, const Draw *draws,
                 int64_t *tokens) {
    const int64_t num_parts = (vocab + SPAN - 1) / SPAN;
    Part *parts = room(rows * num_parts, sizeof(Part));
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        assemble(&team);
        for (int64_t i; (i = take(&team, 1)) < rows * num_parts;)
            parts[i] = look_at(logits + i / num_parts * width, i % num_parts * SPAN, vocab, draws + i / num_parts);
        meet(&team);
        for (int64_t row; (row = take(&team, 1)) < rows;)
            tokens[row] = decide(logits + row * width, vocab, draws + row, parts + row * num_parts, num_parts);
        meet(&team);
    }
    free(parts);
}

static void add_noise(int threads, Noisy *rows, int64_t count, const int64_t *tokens, int64_t vocab) {
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        assemble(&team);
        perturb_rows(&team, rows, count, tokens, vocab);
    }
}

/* The noise of each key at these tokens: out [num_keys][num_tokens]. */
void medusa_noise(int threads, const uint64_t *keys, int64_t num_keys, const int64_t *tokens, int64_t num_tokens, float *out) {
    Noisy *rows = room(num_keys, sizeof *rows);
    memset(out, 0, num_keys * num_tokens * sizeof *out);
    for (int64_t k = 0; k < num_keys; k++) rows[k] = (Noisy){out + k * num_tokens, {1.0f, 1.0f, 0.0f, 0, keys[k]}, 1.0f, 0.0f, 0.0f};
    add_noise(threads, rows, num_keys, tokens, num_tokens);
    free(rows);
}

/* Trees of a sequential drafter. states [sum of num_chain][hidden]: before each token of the chains; token_ids [vocab]:
 * the draft vocabulary; slots from `scratch` on are free. tokens, parents, values: [sum of num_nodes], counts: [num_asks]. */
void medusa_draft(int threads, const Drafter *drafter, const Rules *rules, const Buffers *b, const Ask *asks,
                  int64_t num_asks, const float *states, int64_t scratch, const int64_t *token_ids, int64_t vocab,
                  int64_t *tokens, int64_t *parents, float *values, int64_t *counts) {
    const int64_t size = drafter->trunk.head.inputs, outputs = drafter->trunk.head.outputs, width = rules->width;
    int64_t chains = 0, slots = 0, opened = num_asks * (1 + width * (rules->rounds - 1));
    for (int64_t i = 0; i < num_asks; i++) {
        chains += asks[i].num_chain;
        slots += width * (asks[i].num_context + asks[i].num_chain + rules->rounds);
    }
    const int64_t rows = chains > num_asks * width ? chains : num_asks * width;
    Grove grove = {rules, asks, num_asks, rules->ranks * (1 + width * (rules->rounds - 1)), 0, 0, scratch, 0, 0, 0};
    grove.counts = room(num_asks, sizeof(int64_t)), grove.root_states = room(num_asks, sizeof(int64_t));
    grove.nodes = room(num_asks * grove.most, sizeof(Node)), grove.states = room(opened * size, sizeof(float));
    memset(grove.counts, 0, num_asks * sizeof(int64_t));
    int64_t *places = room(slots + 6 * rows, sizeof(int64_t)); /* one block for all arrays of integers */
    Round round = {{0}, room(rows, sizeof(Segment)), places + 6 * rows, places, places + rows, room(rows, sizeof(int32_t)),
                   places + 2 * rows, places + 3 * rows, places + 4 * rows, places + 5 * rows,
                   room(rows * size, sizeof(float)), room(num_asks * width * outputs, sizeof(float)),
                   room(num_asks * width * rules->ranks, sizeof(float)), 0, 0};
    round.best = room(num_asks * width * rules->ranks, sizeof(int64_t));
    Noisy *noisy = room(num_asks * width, sizeof *noisy);
    for (int64_t n = 0; n < rules->rounds; n++) {
        round.step = (Step){round.segments, 0, round.table, round.positions, round.slots, round.parents, 0};
        round.num_opened = 0;
        if (n) sprout(&grove, &round, size);
        else plant(&grove, &round, states, size);
        if (!round.num_opened) break;
        float *found = grove.states + grove.num_states * size;
        const Asked asked = {round.rows, round.num_opened, 0, round.num_opened, found, round.logits};
        medusa_guess(threads, drafter, &round.step, b, round.tokens, round.inputs, &asked);
        const int64_t num_noisy = list_noisy(&grove, &round, outputs, noisy);
        if (num_noisy) add_noise(threads, noisy, num_noisy, token_ids, vocab);
        medusa_best(round.logits, round.num_opened, outputs, vocab, rules->ranks, round.best, round.shares);
        for (int64_t k = 0; k < round.num_opened; k++) {
            const int64_t i = round.owners[k], node = round.nodes[k];
            *(node < 0 ? grove.root_states + i : &grove.nodes[i * grove.most + node].state) = grove.num_states++;
            open_node(&grove, i, node, token_ids, round.best + k * rules->ranks, round.shares + k * rules->ranks);
        }
    }
    harvest(&grove, tokens, parents, values, counts);
    void *all[] = {grove.counts, grove.root_states, grove.nodes, grove.states, places, round.segments, round.parents,
                   round.inputs, round.logits, round.shares, round.best, noisy};
    for (uint64_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
}

/* out [count][outputs] = x [count][inputs] times the weights. */
void medusa_linear(int threads, const Linear *linear, int64_t count, const float *x, const Rows *rows, float *out) {
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        assemble(&team);
        narrow(&team, rows, count, x);
        multiply(&team, linear, rows, count, SET, out, 0);
    }
}

/* out [rows][heads][v_dim]; K and V of the rows are in their slots. query: [rows][heads][k_dim]. */
void medusa_attention(int threads, const Attention *attention, const Step *step, const float *query, float *out) {
    Team team = {0};
#pragma omp parallel num_threads(threads)
    {
        assemble(&team);
        Scratch scratch;
        attend(&team, &scratch, attention, step, query, out, 0);
    }
}
