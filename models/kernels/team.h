/* The threads of one call. They share the work of a stage piece by piece and meet at its end.
 *
 * Invariant: which thread does which piece changes no result. Threads wait by spinning, for a stage lasts microseconds;
 * one that waits long (its neighbour has lost its core to another program) sleeps, and leaves its own core to them.
 */
#ifndef MEDUSA_TEAM_H
#define MEDUSA_TEAM_H

#include <limits.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define SPINS 1000 /* some 20 us */

typedef struct {
    int size;
    atomic_int arrived;
    atomic_int stage;
    atomic_int asleep;
    atomic_long next[2]; /* of the running stage, and of the one after it */
} Team;

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_while(Team *team, int stage) {
#ifdef __linux__
    atomic_fetch_add(&team->asleep, 1);
    while (atomic_load(&team->stage) == stage)
        syscall(SYS_futex, &team->stage, FUTEX_WAIT_PRIVATE, stage, (void *)0, (void *)0, 0);
    atomic_fetch_sub(&team->asleep, 1);
#else
    while (atomic_load(&team->stage) == stage) sched_yield();
#endif
}

static void wake(Team *team) {
#ifdef __linux__
    if (atomic_load(&team->asleep)) syscall(SYS_futex, &team->stage, FUTEX_WAKE_PRIVATE, INT_MAX, (void *)0, (void *)0, 0);
#else
    (void)team;
#endif
}

/* This thread has done its pieces of the stage; go on when all have. */
static inline void meet(Team *team) {
    const int stage = atomic_load_explicit(&team->stage, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->size - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next[stage & 1], 0, memory_order_relaxed);
        atomic_store(&team->stage, stage + 1);
        wake(team);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->stage, memory_order_acquire) == stage; spins++) {
        if (spins == SPINS) return sleep_while(team, stage);
        pause_cpu();
    }
}

/* The next piece of [0, total) in pieces of `size`: its first element; not below `total` when nothing is left. */
static inline int64_t take(Team *team, int64_t size) {
    int stage = atomic_load_explicit(&team->stage, memory_order_relaxed);
    return atomic_fetch_add_explicit(&team->next[stage & 1], size, memory_order_relaxed);
}

#endif
