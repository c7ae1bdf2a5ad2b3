//! A queue for writes that keeps threads free for reads.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Limits how many writes run, and queues further ones.
///
/// If the volume's buffer is full, writes wait for the connection, and the kernel sends a hundred of
/// them. If each occupied a thread, a read would wait behind them in `/dev/fuse`. So when `running_max`
/// writes are running, further ones are copied and queued. The threads that run writes take them from
/// the queue when they have finished their own, until the queue is empty.
pub(crate) struct WriteQueue<W> {
    running_max: usize,
    waiting_bytes_max: usize,
    state: Mutex<QueueState<W>>,
    changed: Condvar,
}

struct QueueState<W> {
    running: usize,
    waiting: VecDeque<(usize, W)>,
    waiting_bytes: usize,
}

impl<W> WriteQueue<W> {
    /// A queue that runs up to `running_max` (at least 1) writes. It queues up to `waiting_bytes_max`
    /// bytes of others, or one write if that is larger.
    pub(crate) fn new(running_max: usize, waiting_bytes_max: usize) -> Self {
        Self {
            running_max: running_max.max(1),
            waiting_bytes_max,
            state: Mutex::new(QueueState {
                running: 0,
                waiting: VecDeque::new(),
                waiting_bytes: 0,
            }),
            changed: Condvar::new(),
        }
    }

    /// Runs a write of `bytes` in this thread, and then the queued ones. Or queues it. Waits only if the
    /// queue is full.
    ///
    /// `write` runs the request now. `copy` converts it for the queue, and `run` runs a queued one
    /// later. None of the three may panic.
    pub(crate) fn submit<R>(
        &self,
        bytes: usize,
        request: R,
        write: impl FnOnce(R),
        copy: impl FnOnce(R) -> W,
        run: impl Fn(W),
    ) {
        let mut state = self.lock();
        loop {
            if state.running < self.running_max {
                state.running += 1;
                drop(state);
                write(request);
                return self.run_waiting(run);
            }
            let fits = state.waiting_bytes.saturating_add(bytes) <= self.waiting_bytes_max;
            if fits || state.waiting.is_empty() {
                state.waiting_bytes += bytes;
                state.waiting.push_back((bytes, copy(request)));
                return;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends this thread's write. Runs queued writes first.
    fn run_waiting(&self, run: impl Fn(W)) {
        loop {
            let mut state = self.lock();
            let next = state.waiting.pop_front();
            match &next {
                Some((bytes, _)) => state.waiting_bytes -= bytes,
                None => state.running -= 1,
            }
            drop(state);
            self.changed.notify_one();
            match next {
                Some((_, write)) => run(write),
                None => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_write_runs_once_and_the_limit_is_kept() {
        let queue = WriteQueue::new(3, 10);
        let (running, most, done) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            Mutex::new(Vec::new()),
        );
        let write = |number: usize| {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(50));
            running.fetch_sub(1, Ordering::SeqCst);
            done.lock().unwrap().push(number);
        };
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (queue, write) = (&queue, &write);
                scope.spawn(move || {
                    for i in 0..200 {
                        let number = thread * 200 + i;
                        queue.submit(1 + number % 7, number, write, |number| number, write);
                    }
                });
            }
        });
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..1600).collect::<Vec<_>>());
        assert!(most.load(Ordering::SeqCst) <= 3);
        let state = queue.lock();
        assert_eq!((state.running, state.waiting_bytes), (0, 0));
    }

    #[test]
    fn a_thread_is_free_while_its_write_is_queued() {
        let queue = WriteQueue::new(1, 100);
        let gate = Mutex::new(());
        let shut = gate.lock().unwrap();
        let (queue, gate) = (&queue, &gate);
        let wait = move |()| drop(gate.lock().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(move || queue.submit(10, (), wait, |()| (), wait));
            while queue.lock().running == 0 {
                std::thread::yield_now();
            }
            // Returns although the gate is shut.
            queue.submit(100, (), wait, |()| (), wait);
            drop(shut);
        });
        assert_eq!(queue.lock().waiting_bytes, 0);
    }
}
