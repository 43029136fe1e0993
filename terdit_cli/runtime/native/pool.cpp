// Workers wait for a generation number to change, do their own range of the tasks, then tasks left
// in the ranges of others, and report back. As the tasks of every job go by rows, a thread gets the
// rows again that are in its cache. Between the jobs of one call they spin for some microseconds,
// because the next job comes soon; after that they sleep, so nothing spins after a call.
#include "pool.h"

#include <atomic>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include "ternary.h"

namespace {

constexpr int kSpins = 4000;  // about 50 microseconds

struct Job {
    PoolTask run;
    void *context;
    int64_t tasks;
    int workers;  // number of workers that take part
};

pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;   // held during a call
pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

Job job;
std::atomic<uint64_t> generation{0};
// Each thread's own range of the tasks; others take from it when theirs is done.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};
Share shares[TERDIT_MAX_THREADS];
std::atomic<int> still_working{0};
std::atomic<int> sleepers{0};
int workers = 0;  // started
int taking_part = 0;

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void take_tasks(int thread) {
    const int threads = job.workers + 1;
    for (int i = 0; i < threads; i++) {
        Share &share = shares[(thread + i) % threads];
        for (;;) {
            const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
            if (task >= share.end) break;
            job.run(job.context, task, thread);
        }
    }
}

void wait_for(uint64_t seen) {
    for (int spin = 0; spin < kSpins; spin++) {
        if (generation.load(std::memory_order_acquire) != seen) return;
        pause_cpu();
    }
    pthread_mutex_lock(&sleep_lock);
    sleepers.fetch_add(1);
    while (generation.load() == seen) pthread_cond_wait(&wake, &sleep_lock);
    sleepers.fetch_sub(1);
    pthread_mutex_unlock(&sleep_lock);
}

struct Start {
    int thread;
    uint64_t seen;
};

Start starts[TERDIT_MAX_THREADS];

void *work(void *argument) {
    const Start start = *static_cast<Start *>(argument);
    for (uint64_t seen = start.seen;;) {
        wait_for(seen);
        // Every worker reports every generation before the next starts, so none is missed.
        seen++;
        if (start.thread <= job.workers) take_tasks(start.thread);
        still_working.fetch_sub(1, std::memory_order_acq_rel);
    }
    return nullptr;
}

// The child of a fork has none of the threads, and the locks in their state at that moment.
void forget_everything() {
    static const pthread_mutex_t fresh_mutex = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t fresh_cond = PTHREAD_COND_INITIALIZER;
    turn = fresh_mutex;
    sleep_lock = fresh_mutex;
    wake = fresh_cond;
    workers = 0;
    sleepers.store(0);
    still_working.store(0);
}

void install_fork_handler() { pthread_atfork(nullptr, nullptr, forget_everything); }

}  // namespace

void pool_enter(int threads) {
    pthread_once(&fork_handler, install_fork_handler);
    pthread_mutex_lock(&turn);
    if (threads > TERDIT_MAX_THREADS) threads = TERDIT_MAX_THREADS;
    // Workers block signals, which are for the calling thread: it runs Python.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (workers < threads - 1) {
        starts[workers] = {workers + 1, generation.load()};
        pthread_t thread;
        if (pthread_create(&thread, nullptr, work, &starts[workers]) != 0) break;
        pthread_detach(thread);
        workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    taking_part = threads - 1 < workers ? threads - 1 : workers;
}

void pool_leave() { pthread_mutex_unlock(&turn); }

void pool_run(int64_t tasks, PoolTask run, void *context) {
    if (taking_part == 0 || tasks < 2) {
        for (int64_t task = 0; task < tasks; task++) run(context, task, 0);
        return;
    }
    job = {run, context, tasks, taking_part};
    for (int i = 0; i <= taking_part; i++) {
        shares[i].next.store(tasks * i / (taking_part + 1), std::memory_order_relaxed);
        shares[i].end = tasks * (i + 1) / (taking_part + 1);
    }
    still_working.store(workers, std::memory_order_relaxed);
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    take_tasks(0);
    for (int spin = 0; still_working.load(std::memory_order_acquire) > 0; spin++) {
        pause_cpu();
        if (spin >= kSpins) sched_yield();  // a worker may need this CPU
    }
}
