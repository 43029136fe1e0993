// One pool of threads for the whole process.
#ifndef TERDIT_POOL_H
#define TERDIT_POOL_H

#include <stdint.h>

typedef void (*PoolTask)(void *context, int64_t task, int thread);

// Locks the pool for one call of the library; other callers wait, so that no more than `threads`
// threads ever compute. Starts missing workers; uses fewer if they cannot be started.
void pool_enter(int threads);
void pool_leave();

// Runs task 0 .. tasks - 1, each once, on the calling thread (thread 0) and the workers; returns
// when all are done. Between pool_enter and pool_leave only.
void pool_run(int64_t tasks, PoolTask run, void *context);

#endif
