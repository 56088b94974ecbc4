/* The threads of one call. They share the work of a stage piece by piece and meet at its end.
 *
 * Invariant: which thread does which piece changes no result. Threads wait by spinning, for a stage lasts microseconds;
 * one that waits long (its neighbour lost its core) yields.
 */
#ifndef MEDUSA_TEAM_H
#define MEDUSA_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define SPINS 4000

typedef struct {
    int size;
    atomic_int arrived;
    atomic_int stage;
    atomic_long next[2]; /* of the running stage, and of the one after it */
} Team;

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* All threads have done their pieces of the stage; go on to the next. */
static inline void meet(Team *team) {
    int stage = atomic_load_explicit(&team->stage, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->size - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next[stage & 1], 0, memory_order_relaxed);
        atomic_store_explicit(&team->stage, stage + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->stage, memory_order_acquire) == stage; spins++)
        if (spins < SPINS) pause_cpu();
        else sched_yield();
}

/* The next piece of [0, total) in pieces of `size`: its first element; not below `total` when nothing is left. */
static inline int64_t take(Team *team, int64_t size) {
    int stage = atomic_load_explicit(&team->stage, memory_order_relaxed);
    return atomic_fetch_add_explicit(&team->next[stage & 1], size, memory_order_relaxed);
}

#endif
