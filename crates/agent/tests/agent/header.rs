//! Writes to the header, where the keys are.

use crate::client::{BLOCK, READ_WRITE, Served, blocks, string};

const DENIED: u32 = 3;

fn served(header: &str) -> Served {
    let policy = format!(
        "new = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = {header}\nheader_bytes = 8K\n"
    );
    Served::with_container(&policy, &blocks(8, 1))
}

fn status(served: &Served) -> (Option<i32>, String) {
    let output = served.command(&["status"]).output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

#[test]
fn a_write_to_the_header_gives_an_alarm_unless_it_is_allowed() {
    let served = served("alarm");
    let block = BLOCK as u64;
    served.overwrite(&[(2 * block, vec![1; BLOCK])]);
    assert_eq!(status(&served).0, Some(0));
    served.run(&["allow-header", "x.luks"]);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    assert_eq!(status(&served).0, Some(0));
    // The time is over.
    served.run(&["allow-header", "x.luks", "--for", "0s"]);
    served.overwrite(&[(2 * block - 1, vec![2; 1])]);
    let (code, text) = status(&served);
    assert!(code == Some(3) && text.contains("header"), "{text}");
    assert!(served.run(&["tidy"]).contains("nothing expires"));
    served.run(&["ack", "x.luks"]);
    assert_eq!(status(&served).0, Some(0));
}

#[test]
fn a_refused_header_is_not_written_by_any_request() {
    let served = served("refuse");
    let block = BLOCK as u64;
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 2 * block, &[1; BLOCK]), 0);
    let before = served.live();
    assert_eq!(client.write(&handle, 0, &[2; 10]), DENIED);
    assert_eq!(client.write(&handle, 2 * block - 1, &[2; 10]), DENIED);
    // Partly header.
    assert_eq!(client.write(&handle, block, &[2; 2 * BLOCK]), DENIED);
    let range = |from: u64, len: u64| {
        let count = 1_u32.to_be_bytes();
        [
            string(&handle),
            count.to_vec(),
            [from.to_be_bytes(), len.to_be_bytes()].concat(),
        ]
        .concat()
    };
    for request in ["punch@sprat", "will-write@sprat"] {
        assert_eq!(client.own(request, &range(0, 4 * block)), Err(DENIED));
    }
    assert!(served.live() == before);
    served.run(&["allow-header", "x.luks", "--for", "1h"]);
    assert_eq!(client.write(&handle, 0, &[3; 10]), 0);
    client.end();
    served.run(&["allow-header", "x.luks", "--for", "0s"]);
    // The administrator may always write it back.
    let name = served.head(1, "name");
    served.run(&["revert", "x.luks", &name, "--yes"]);
    assert!(served.live() == blocks(8, 1));
}
