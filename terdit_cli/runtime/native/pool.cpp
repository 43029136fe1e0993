// Workers wait for a job to open, take their own stretch of its tasks, then what others have left of
// theirs. Where the tasks of every job go by rows, a thread so meets the rows again that are in its
// cache. Between the jobs of one call they spin for some microseconds, because the next job is near;
// after that they sleep, so nothing spins once a call has returned.
//
// On a busy machine a worker may get no CPU for milliseconds. So the caller closes a job when no
// task is left, and waits for those workers alone that are at one; who comes later goes back to
// waiting. A caller that waits long sleeps too: its CPU is then free for the worker.
#include "pool.h"

#include <atomic>
#include <pthread.h>
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
pthread_cond_t wake = PTHREAD_COND_INITIALIZER;      // of workers: a job has opened
pthread_cond_t finished = PTHREAD_COND_INITIALIZER;  // of the caller: no worker is at a task
pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

Job job;
// Low bits: the workers at the job, and whether it takes more; above them, the job's number.
constexpr uint64_t kOpen = 1 << 15, kWorkers = kOpen - 1, kNumber = kOpen << 1;
std::atomic<uint64_t> state{0};
// Each thread's own stretch of the tasks; another takes from it when it has none left.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};
Share shares[TERDIT_MAX_THREADS];
std::atomic<int> sleepers{0};
std::atomic<bool> caller_sleeps{false};
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

uint64_t number() { return state.load() / kNumber; }

// Returns when there is a job after that of number `seen`.
void wait_for(uint64_t seen) {
    for (int spin = 0; spin < kSpins; spin++) {
        if (number() != seen) return;
        pause_cpu();
    }
    pthread_mutex_lock(&sleep_lock);
    sleepers.fetch_add(1);
    while (number() == seen) pthread_cond_wait(&wake, &sleep_lock);
    sleepers.fetch_sub(1);
    pthread_mutex_unlock(&sleep_lock);
}

// Joins the newest job if it is open, and so keeps `job` and `shares` as they are; tells its number.
bool join(uint64_t &seen) {
    uint64_t now = state.load();
    while ((now & kOpen) && !state.compare_exchange_weak(now, now + 1)) {}
    seen = now / kNumber;
    return now & kOpen;
}

void leave() {
    const uint64_t left = state.fetch_sub(1) - 1;
    if ((left & (kOpen | kWorkers)) || !caller_sleeps.load()) return;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_signal(&finished);
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
        if (!join(seen)) continue;
        if (start.thread <= job.workers) take_tasks(start.thread);
        leave();
    }
    return nullptr;
}

// The child of a fork has none of the threads, and the locks in their state at that moment.
void forget_everything() {
    static const pthread_mutex_t fresh_mutex = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t fresh_cond = PTHREAD_COND_INITIALIZER;
    turn = fresh_mutex;
    sleep_lock = fresh_mutex;
    wake = finished = fresh_cond;
    workers = 0;
    sleepers.store(0);
    caller_sleeps.store(false);
    state.fetch_and(~(kOpen | kWorkers));
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
        starts[workers] = {workers + 1, number()};
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
    state.store((number() + 1) * kNumber | kOpen);
    if (sleepers.load() > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    take_tasks(0);
    state.fetch_and(~kOpen);
    for (int spin = 0; spin < kSpins; spin++) {
        if (!(state.load() & kWorkers)) return;
        pause_cpu();
    }
    pthread_mutex_lock(&sleep_lock);
    caller_sleeps.store(true);
    while (state.load() & kWorkers) pthread_cond_wait(&finished, &sleep_lock);
    caller_sleeps.store(false);
    pthread_mutex_unlock(&sleep_lock);
}
