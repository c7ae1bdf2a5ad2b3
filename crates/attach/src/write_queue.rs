//! Keeps threads free for reads: only so many writes run at once, further ones are set aside.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Writes that run and writes that wait.
///
/// A volume whose buffer is full lets writes wait for the line, and the kernel sends a hundred of
/// them. If each held a thread, the read that somebody waits for would stay unread in `/dev/fuse`
/// behind them. So a write beyond `running_max` is copied and set aside, and the threads that run
/// writes take it up when they are done with their own: nothing is left over when they stop.
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
    /// A queue that lets `running_max` (at least 1) writes run, and sets aside up to
    /// `waiting_bytes_max` bytes of others, or one write if that is larger.
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

    /// Runs a write of `bytes` in this thread, and after it those that were set aside meanwhile; or
    /// sets it aside. Waits only if the limit of what is set aside is reached.
    ///
    /// `write` gets what it needs in `request`; `copy` makes of it something that can wait, which
    /// `run` carries out later. None of the three may panic.
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

    /// Ends this thread's write; takes up what waits first.
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
    fn every_write_runs_once_and_never_more_than_allowed_at_a_time() {
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
    fn a_thread_is_free_again_while_its_write_waits() {
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
            // Returns though the gate is shut.
            queue.submit(100, (), wait, |()| (), wait);
            drop(shut);
        });
        assert_eq!(queue.lock().waiting_bytes, 0);
    }
}
