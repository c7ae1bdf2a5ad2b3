//! A lease over connections that are lost, or whose requests are counted.

use super::*;

/// What happens to a connection at a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Goes,
    /// Lost before the request arrives.
    EndsBefore,
    /// The request may be carried out, and its answer is lost.
    EndsAfter,
}

/// A server over a socket; `at` decides about each request that is sent to it.
fn behind(folder: &Path, at: impl Fn(&[u8]) -> Line + Send + Sync + 'static) -> SftpStore {
    let at = Arc::new(at);
    let program = agent_server::sftp_server(folder).unwrap();
    let dial = move || {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut server = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut answers = server.stdout.take().unwrap();
        let mut back = there.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
        let at = Arc::clone(&at);
        std::thread::spawn(move || {
            let mut requests = server.stdin.take().unwrap();
            let mut head = [0; 4];
            while there.read_exact(&mut head).is_ok() {
                let mut body = vec![0; u32::from_be_bytes(head) as usize];
                there.read_exact(&mut body).unwrap();
                let line = at(&body);
                if line != Line::Goes {
                    there.shutdown(Shutdown::Both).unwrap();
                }
                if line == Line::EndsBefore
                    || requests.write_all(&[&head[..], &body].concat()).is_err()
                {
                    break;
                }
                if line == Line::EndsAfter {
                    // When its input ends, sftp-server carries out nothing more.
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            drop(requests);
            server.wait().unwrap();
        });
        Ok(Wire::over_socket(here).unwrap())
    };
    let options = crate::part::piped(folder, &[]);
    SftpStore::connect_over(Box::new(dial), options).unwrap()
}

/// A server, and a counter of the requests whose answers are waited for (closes don't count).
fn counted(folder: &Path) -> (SftpStore, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&count);
    let store = behind(folder, move |body| {
        counting.fetch_add(usize::from(body[0] != 4), Ordering::SeqCst);
        Line::Goes
    });
    (store, count)
}

#[test]
fn lease_that_could_not_be_released_is_taken_over_by_its_host() {
    requires!(needs::sftp_server_missing());
    let writes = |body: &[u8]| body[0] == 6;
    // The check of the next number, after "free".
    let looks = |body: &[u8]| body[0] == 7 && body.ends_with(b".lock.1000002");
    for (ends, end) in [
        (writes as fn(&[u8]) -> bool, Line::EndsBefore),
        (writes, Line::EndsAfter),
        (looks, Line::EndsBefore),
        (looks, Line::EndsAfter),
    ] {
        let (folder, here, there) = (host(), host(), host());
        let (mine, theirs) = (record(here.path()), record(there.path()));
        let armed = Arc::new(AtomicBool::new(false));
        let arming = Arc::clone(&armed);
        let store = behind(folder.path(), move |body| {
            if arming.load(Ordering::SeqCst) && body.len() > 9 && ends(body) {
                return end;
            }
            Line::Goes
        });
        let lock = take(&store, &mine).unwrap();
        armed.store(true, Ordering::SeqCst);
        let failed = lock.release(&store);
        assert!(matches!(failed, Err(LockError::Store { .. })), "{failed:?}");
        drop(store);

        let store = behind(folder.path(), |_| Line::Goes);
        let is_held = held(&store).is_some();
        assert!(is_held || (end, ends(&[6; 20])) != (Line::EndsBefore, true));
        if is_held {
            assert_held(take(&store, &theirs), FIRST);
        }
        let lock = take(&store, &mine).unwrap();
        assert_eq!((lock.number(), lock.took_over()), (FIRST + 1, is_held));
        lock.verify(&store).unwrap();
        lock.release(&store).unwrap();
        take(&store, &theirs).unwrap();
    }
}

/// sftp-server -P remove,rename.
#[test]
fn account_that_may_not_remove_alternates_with_another_machine() {
    requires!(needs::sftp_server_missing());
    let (folder, here, there) = (host(), host(), host());
    let argv = [
        needs::plain_sftp_server().unwrap().into_os_string(),
        "-P".into(),
        "remove,rename,posix-rename@openssh.com".into(),
    ];
    for turn in 0..10 {
        let options = crate::part::options(argv.to_vec(), folder.path());
        let store = SftpStore::connect(options).unwrap();
        let record = record(if turn % 2 == 0 {
            here.path()
        } else {
            there.path()
        });
        let lock = take(&store, &record).unwrap();
        assert_eq!(lock.number(), FIRST + turn);
        lock.renew(&store).unwrap();
        let _ = lock.remove_old(&store);
        lock.release(&store).unwrap();
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 10);
}

#[test]
fn lock_sends_no_request_twice() {
    requires!(needs::sftp_server_missing());
    let (folder, state) = (host(), host());
    let (store, count) = counted(folder.path());
    // Counted as a sum: no answer to a close is waited for, so it may be counted with the next
    // step.
    let mut bound = count.load(Ordering::SeqCst);
    let mut asked = |what: &str, at_most: usize| {
        bound += at_most;
        let now = count.load(Ordering::SeqCst);
        assert!(now <= bound, "{what}: {} requests too many", now - bound);
    };
    let lock = take(&store, &record(state.path())).unwrap();
    // Two checks of the folder, one of them with the own lease in it and a check of the next
    // number; a file and a folder that are opened and flushed; the content.
    asked("acquiring", 3 + 7 + 5 + 1);
    lock.verify(&store).unwrap();
    asked("checking it again", 2 + 3);
    lock.release(&store).unwrap();
    asked("releasing it", 4);
}
