/* Trees of a sequential drafter, grown best first: models.drafters.growth and sequential_drafter once more, for requests
 * without masks. Included by cpu.c, whose `guess` runs the layer.
 *
 * Invariant: a node's parent comes before it, and its value is at most its parent's.
 */
#ifndef MEDUSA_DRAFT_H
#define MEDUSA_DRAFT_H

#include "draw.h"

/* How trees grow; the values are Python's. */
typedef struct {
    int64_t ranks, width, rounds; /* guesses below a node; nodes opened in a round; rounds at most, the root's included */
    float least_value, next_right, least_gain, heard, noisy_sureness, outside;
} Rules;

/* One request: the tokens that the layer has not seen, the root last, and what is asked for. */
typedef struct {
    const int64_t *context; /* slots that come before */
    const int64_t *tokens, *slots; /* [num_chain] */
    int64_t num_context, num_chain, position; /* of the first of them */
    int64_t num_nodes, max_depth;
    float least_value; /* of a node that pays */
    Draw draw; /* how the verifier draws; the key without a position */
} Ask;

typedef struct {
    int64_t token, parent, depth, slot; /* slot: 0 until opened */
    int64_t state;                      /* row of the states, once opened */
    float value;
} Node;

/* All trees of a call. The nodes of request i begin at i * most. */
typedef struct {
    const Rules *rules;
    const Ask *asks;
    int64_t num_asks, most, *counts; /* counts: nodes so far, [asks] */
    Node *nodes;
    int64_t next_slot, num_states;
    float *states;                   /* [opened nodes][hidden], what the layer gave for each */
    int64_t *root_states;            /* [asks] */
} Grove;

/* The rows of one round, as many as there is room for. */
typedef struct {
    Step step;
    Segment *segments;
    int64_t *table, *positions, *slots;
    int32_t *parents;
    int64_t *tokens, *rows, *owners, *nodes; /* owners, nodes: which node of which request a row opens; -1 is the root */
    float *inputs, *logits, *shares;
    int64_t *best, num_opened;
} Round;

INLINE int is_better(const Node *nodes, int64_t a, int64_t b) {
    return nodes[a].value > nodes[b].value || (nodes[a].value == nodes[b].value && a < b);
}

/* The `count` best nodes, best first. Returns how many there are. */
static int64_t best_nodes(const Node *nodes, int64_t total, int64_t count, int64_t *best) {
    int64_t found = 0;
    for (int64_t i = 0; i < total; i++) {
        if (found == count && !is_better(nodes, i, best[count - 1])) continue;
        int64_t place = found < count ? found++ : count - 1;
        for (; place > 0 && is_better(nodes, i, best[place - 1]); place--) best[place] = best[place - 1];
        best[place] = i;
    }
    return found;
}

/* Nodes of one request to open now: models.drafters.growth.Growth.next_round. */
static int64_t next_round(const Rules *rules, const Ask *ask, const Node *nodes, int64_t total, int64_t *chosen) {
    int64_t best[64], count = 0;
    const int64_t found = best_nodes(nodes, total, ask->num_nodes, best);
    const float last = found == ask->num_nodes ? nodes[best[found - 1]].value : 0.0f;
    const float worst = last > ask->least_value ? last : ask->least_value;
    const float least = worst > rules->least_value ? worst : rules->least_value;
    float gain = 0.0f;
    for (int64_t k = 0; k < found && count < rules->width; k++) {
        const Node *node = nodes + best[k];
        if (node->slot || node->depth >= ask->max_depth || !(node->value > least)) continue;
        const float more = node->value * rules->next_right - worst;
        gain += more > 0 ? more : 0;
        chosen[count++] = best[k];
    }
    return gain >= rules->least_gain ? count : 0;
}

/* What may follow `node`, or the root (-1). */
static void open_node(Grove *grove, int64_t request, int64_t node, const int64_t *ids, const int64_t *best,
                      const float *shares) {
    Node *nodes = grove->nodes + request * grove->most;
    const float value = node < 0 ? 1.0f : nodes[node].value;
    const int64_t depth = node < 0 ? 1 : nodes[node].depth + 1;
    for (int64_t k = 0; k < grove->rules->ranks && shares[k] > 0.0f; k++)
        nodes[grove->counts[request]++] = (Node){ids[best[k]], node, depth, 0, 0, value * shares[k]};
}

/* Where the slots of the next segment go. */
static int64_t table_end(const Round *round) {
    if (!round->step.num_segments) return 0;
    const Segment *last = round->segments + round->step.num_segments - 1;
    return last->table + last->context + last->chain;
}

/* A segment of `rows` chained rows, behind `context` slots; its slots are in the table already. */
static void put_segment(Round *round, int64_t context, int64_t rows) {
    Step *step = &round->step;
    const Segment segment = {table_end(round), context, step->rows, rows, rows};
    round->segments[step->num_segments++] = segment;
    step->rows += rows;
}

/* The slots that a row below a request's root looks at: context, chain, and the path down to `node`, itself excluded. */
static int64_t put_table(const Ask *ask, const Node *nodes, int64_t node, int64_t *table) {
    int64_t length = ask->num_context, depth = nodes[node].depth - 1;
    memcpy(table, ask->context, length * sizeof *table);
    memcpy(table + length, ask->slots, ask->num_chain * sizeof *table);
    length += ask->num_chain + depth;
    for (int64_t above = nodes[node].parent, at = length; above >= 0; above = nodes[above].parent) table[--at] = nodes[above].slot;
    return length;
}

/* The chains of all requests, whose last rows open the roots. */
static void plant(Grove *grove, Round *round, const float *states, int64_t size) {
    for (int64_t i = 0; i < grove->num_asks; i++) {
        const Ask *ask = grove->asks + i;
        const int64_t first = round->step.rows, at = table_end(round);
        memcpy(round->table + at, ask->context, ask->num_context * sizeof *round->table);
        memcpy(round->table + at + ask->num_context, ask->slots, ask->num_chain * sizeof *round->table);
        for (int64_t r = 0; r < ask->num_chain; r++) {
            round->tokens[first + r] = ask->tokens[r];
            round->positions[first + r] = ask->position + r;
            round->slots[first + r] = ask->slots[r];
            round->parents[first + r] = -1;
        }
        put_segment(round, ask->num_context, ask->num_chain);
        round->rows[round->num_opened] = round->step.rows - 1;
        round->owners[round->num_opened] = i;
        round->nodes[round->num_opened++] = -1;
    }
    memcpy(round->inputs, states, round->step.rows * size * sizeof *states);
}

/* A row for each node that is worth it. */
static void sprout(Grove *grove, Round *round, int64_t size) {
    int64_t chosen[64];
    for (int64_t i = 0; i < grove->num_asks; i++) {
        const Ask *ask = grove->asks + i;
        Node *nodes = grove->nodes + i * grove->most;
        const int64_t count = next_round(grove->rules, ask, nodes, grove->counts[i], chosen);
        for (int64_t k = 0; k < count; k++) {
            Node *node = nodes + chosen[k];
            const int64_t row = round->step.rows, above = node->parent;
            const int64_t length = put_table(ask, nodes, chosen[k], round->table + table_end(round));
            node->slot = grove->next_slot++;
            round->table[table_end(round) + length] = node->slot;
            round->tokens[row] = node->token;
            round->positions[row] = ask->position + ask->num_chain - 1 + node->depth;
            round->slots[row] = node->slot;
            round->parents[row] = -1;
            memcpy(round->inputs + row * size, grove->states + (above < 0 ? grove->root_states[i] : nodes[above].state) * size,
                   size * sizeof *round->inputs);
            put_segment(round, length, 1);
            round->rows[round->num_opened] = row;
            round->owners[round->num_opened] = i;
            round->nodes[round->num_opened++] = chosen[k];
        }
    }
}

/* The opened rows whose guesses are drawn with noise. Returns how many there are. */
static int64_t list_noisy(const Grove *grove, const Round *round, int64_t width, Noisy *noisy) {
    int64_t count = 0;
    for (int64_t k = 0; k < round->num_opened; k++) {
        const int64_t i = round->owners[k], node = round->nodes[k];
        const Ask *ask = grove->asks + i;
        const int64_t depth = node < 0 ? 0 : grove->nodes[i * grove->most + node].depth;
        if (!(ask->draw.temperature > 0)) continue;
        noisy[count] = (Noisy){round->logits + k * width, ask->draw, grove->rules->noisy_sureness, 0.0f, grove->rules->outside};
        noisy[count++].draw.key = position_key(ask->draw.key, ask->position + ask->num_chain + depth);
    }
    return count;
}

/* The best nodes of each request as a tree: [sum of num_nodes] each, counts [asks]. */
static void harvest(const Grove *grove, int64_t *tokens, int64_t *parents, float *values, int64_t *counts) {
    for (int64_t i = 0; i < grove->num_asks; i++) {
        int64_t best[64], places[grove->most], count = 0;
        const Node *nodes = grove->nodes + i * grove->most;
        const int64_t found = best_nodes(nodes, grove->counts[i], grove->asks[i].num_nodes, best);
        memset(places, 0, sizeof places);
        const float least = grove->rules->heard * grove->asks[i].least_value;
        for (int64_t k = 0; k < found; k++) places[best[k]] = nodes[best[k]].value >= least;
        for (int64_t n = 0; n < grove->counts[i]; n++) {
            if (!places[n]) continue;
            places[n] = count;
            tokens[count] = nodes[n].token;
            parents[count] = nodes[n].parent < 0 ? -1 : places[nodes[n].parent];
            values[count++] = nodes[n].value;
        }
        counts[i] = count;
        tokens += grove->asks[i].num_nodes, parents += grove->asks[i].num_nodes, values += grove->asks[i].num_nodes;
    }
}

#endif
