//! Work that goes on only while a check allows it: it is checked again and again on a thread of its own.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_session::Failure;
use sprat_session::interrupt::{Hold, Interrupt};

/// Does `work` with an interrupt of its own. It is requested when `interrupt` is, and when `check`, called
/// each `interval`, names a reason to stop. Returns that reason, too.
///
/// Where `check` stops it, the work may take as long as it needs to end in order.
pub(super) fn while_allowed<T>(
    interrupt: &Interrupt,
    interval: Duration,
    check: impl FnMut() -> Option<String> + Send,
    work: impl FnOnce(&Interrupt) -> T,
) -> Result<(T, Option<String>), Failure> {
    let own = Interrupt::never()?;
    let patience = Arc::new(Mutex::new(Some(own.hold())));
    pass_on(interrupt, &own, &patience);
    let (over, ended) = mpsc::channel::<()>();
    Ok(std::thread::scope(|scope| {
        let checked = &own;
        let mut check = check;
        let checks = scope.spawn(move || {
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if let Some(reason) = check() {
                    checked.request();
                    return Some(reason);
                }
            }
            None
        });
        let done = work(&own);
        drop(over);
        (done, checks.join().unwrap_or_default())
    }))
}

/// A request of a person counts for the work, too, and then it has no more time than usual. A request that
/// follows a failed check is the first one of a person, not the second one.
fn pass_on(from: &Interrupt, to: &Interrupt, patience: &Arc<Mutex<Option<Hold>>>) {
    let (to, patience) = (to.clone(), Arc::clone(patience));
    from.on_request(move |count| {
        if let Ok(mut patience) = patience.lock() {
            patience.take();
        }
        if to.requests() < count {
            to.request();
        }
    });
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SOON: Duration = Duration::from_millis(5);

    fn until_requested(interrupt: &Interrupt) -> bool {
        interrupt
            .wait_until(Instant::now() + Duration::from_secs(20))
            .is_err()
    }

    #[test]
    fn a_check_stops_the_work_and_gives_the_reason() {
        let interrupt = Interrupt::never().unwrap();
        let mut left = 3;
        let check = || {
            left -= 1;
            (left == 0).then(|| "metered".to_owned())
        };
        let (stopped, reason) = while_allowed(&interrupt, SOON, check, |own| {
            let stopped = until_requested(own);
            assert_eq!(own.time_left(Duration::ZERO), Duration::ZERO);
            assert_eq!(own.time_left(SOON), SOON, "it may end in order");
            stopped
        })
        .unwrap();
        assert!(stopped && !interrupt.requested());
        assert_eq!(reason.as_deref(), Some("metered"));
    }

    #[test]
    fn an_interrupt_is_passed_on_and_is_no_reason() {
        let interrupt = Interrupt::never().unwrap();
        let never = Duration::from_secs(600);
        let (requests, reason) = while_allowed(
            &interrupt,
            never,
            || None,
            |own| {
                interrupt.request();
                assert!(until_requested(own));
                own.requests()
            },
        )
        .unwrap();
        assert_eq!((requests, reason), (1, None));
    }
}
