use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

use super::*;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn names_are_s3s_and_lead_nowhere_else() {
    for good in ["abc", "a.b-c", "0123456789", &"a".repeat(63)] {
        check_bucket(good).unwrap();
    }
    for bad in
        ["", "ab", "..", "a..b", "-ab", "ab-", "Abc", "a/b", "a_b", "10.0.0.1", &"a".repeat(64), "a\0b"]
    {
        assert_eq!(check_bucket(bad).unwrap_err().code, "InvalidBucketName", "{bad}");
    }
    for good in ["ami-1.bin", "a/b/c", "it's(1)!", ".a", "a..b"] {
        check_key("Key", good).unwrap();
    }
    for bad in [
        "",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        ".",
        ".hutch-owner",
        "a#1",
        "a%2e",
        "ä",
        "a\nb",
        &"a".repeat(201),
    ] {
        assert_eq!(check_key("Key", bad).unwrap_err().code, "InvalidParameterValue", "{bad}");
    }
}

#[test]
fn an_object_is_whole_or_not_there() {
    let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let dir = Objects::directory(&room.path().join("objects"), runtime.handle().clone()).unwrap();
    for objects in [dir, Objects::memory(runtime.handle().clone())] {
        // Three parts and pieces.
        let bytes: Vec<u8> = (0..(PART * 2 + 12_345)).map(|n| (n % 251) as u8).collect();
        let mut writer = objects.write("bucket", "a/b", 1, std::iter::empty()).unwrap();
        writer.write_all(&bytes).unwrap();
        assert!(matches!(objects.read("bucket", "a/b"), Err(ObjectError::Missing(_))));
        drop(writer);
        assert!(matches!(objects.read("bucket", "a/b"), Err(ObjectError::Missing(_))));
        let mut writer = objects.write("bucket", "a/b", 1, std::iter::empty()).unwrap();
        writer.write_all(&bytes).unwrap();
        writer.finish().unwrap();
        let mut read = Vec::new();
        objects.read("bucket", "a/b").unwrap().read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        assert!(objects.small("bucket", "a/b", 100).is_err(), "it is larger");
        // One that is written anew meanwhile is not read half and half.
        let mut reader = objects.read("bucket", "a/b").unwrap();
        reader.read_exact(&mut [0; 100]).unwrap();
        objects.put("bucket", "a/b", bytes.iter().rev().copied().collect()).unwrap();
        assert!(reader.read_to_end(&mut read).is_err());
        objects.delete("bucket", "a/b").unwrap();
        objects.delete("bucket", "a/b").unwrap();
    }
}

#[test]
fn a_bucket_is_whose_it_was_first() {
    let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let open =
        || Objects::open(&format!("file://{}", room.path().display()), runtime.handle().clone()).unwrap();
    let objects = open();
    assert_eq!(objects.check("bucket", "1").unwrap_err().code, "NoSuchBucket");
    objects.take("bucket", "1").unwrap();
    assert_eq!(objects.take("bucket", "2").unwrap_err().code, "AccessDenied");
    // Another daemon sees it so, too.
    assert_eq!(open().check("bucket", "2").unwrap_err().code, "AccessDenied");
    open().take("bucket", "1").unwrap();
    std::fs::write(room.path().join("bucket/.hutch-owner"), "{}").unwrap();
    assert_eq!(objects.check("bucket", "1").unwrap_err().code, "Unavailable", "it says nothing");
}

#[test]
fn what_was_half_written_goes_with_the_next_one() {
    let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let open = || Objects::directory(room.path(), runtime.handle().clone()).unwrap();
    let objects = open();
    let mut writer = objects.write("bucket", "a", 1, std::iter::empty()).unwrap();
    writer.write_all(&vec![1; PART as usize]).unwrap();
    // As a kill would.
    std::mem::forget(writer);
    assert_eq!(std::fs::read_dir(room.path().join("bucket")).unwrap().count(), 1);
    open().write("bucket", "a", 1, std::iter::empty()).unwrap().finish().unwrap();
    let files = std::fs::read_dir(room.path().join("bucket")).unwrap();
    assert_eq!(files.map(|file| file.unwrap().file_name()).collect::<Vec<_>>(), ["a"]);
}

#[test]
fn what_is_no_store_is_told() {
    let runtime = runtime();
    for bad in ["", "objects", "ftp://a/b", "file://host/dir", "s3://bucket?nonsense=1"] {
        assert!(Objects::open(bad, runtime.handle().clone()).is_err(), "{bad}");
    }
    let s3 = "s3://bucket/some/where?aws_endpoint=http://127.0.0.1:1&aws_allow_http=true&aws_access_key_id=a&aws_secret_access_key=b&aws_region=home-1";
    let s3 = Objects::open(s3, runtime.handle().clone()).unwrap();
    assert_eq!(format!("{s3:?}"), "s3://bucket/some/where");
    let place = s3.place("images", "a/b").unwrap();
    assert_eq!((place.as_ref(), s3.named(&place)), ("some/where/images/a/b", "images/a/b"));
}

#[test]
fn a_name_has_one_writer_at_a_time() {
    let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let objects = Objects::directory(room.path(), runtime.handle().clone()).unwrap();
    let bytes = vec![1; PART as usize + 1];
    let mut writer = objects.write("bucket", "a", 1, std::iter::empty()).unwrap();
    writer.write_all(&bytes).unwrap();
    // Those of calls and of tasks are one process.
    let call = objects.for_call().unwrap();
    assert!(matches!(call.put("bucket", "a", vec![2]), Err(ObjectError::Busy(_))));
    let second = call.write("bucket", "a", 1, std::iter::empty()).err().unwrap();
    assert_eq!(Fault::from(second).code, "IncorrectState");
    call.put("bucket", "b", vec![2]).unwrap();
    writer.finish().unwrap();
    let mut read = Vec::new();
    objects.read("bucket", "a").unwrap().read_to_end(&mut read).unwrap();
    assert!(read == bytes, "nobody swept what was begun");
    call.put("bucket", "a", vec![2]).unwrap();
}

#[test]
fn what_is_in_a_bucket_of_nobody_is_nobodys_here() {
    let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let dir = Objects::directory(room.path(), runtime.handle().clone()).unwrap();
    for objects in [dir, Objects::memory(runtime.handle().clone())] {
        objects.put("others", "a/b", vec![1]).unwrap();
        assert_eq!(objects.take("others", "1").unwrap_err().code, "AccessDenied");
        assert_eq!(objects.owner("others").unwrap(), None);
        objects.take("other", "1").unwrap();
        objects.put("other", "a", vec![1]).unwrap();
        objects.take("other", "1").unwrap();
    }
}

/// An S3 server that answers every request so, or, with nothing, never.
fn server(answer: &'static str, runtime: &tokio::runtime::Runtime) -> Objects {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if !answer.is_empty() {
                let head = BufReader::new(&stream).lines().map_while(std::io::Result::ok);
                head.take_while(|line| !line.is_empty()).for_each(drop);
                stream.write_all(answer.as_bytes()).unwrap();
            }
            if answer.is_empty() {
                kept.push(stream);
            }
        }
    });
    let url = format!(
        "s3://bucket?aws_endpoint=http://{at}&aws_allow_http=true&aws_access_key_id=a&aws_secret_access_key=b&aws_region=home-1"
    );
    Objects::open(&url, runtime.handle().clone()).unwrap()
}

#[test]
fn a_call_does_not_wait_for_long_nor_do_too_many() {
    let runtime = runtime();
    let objects = Objects { patience: Duration::from_millis(300), ..server("", &runtime) };
    let before = std::time::Instant::now();
    std::thread::scope(|scope| {
        // None waits for another.
        for _ in 0..CALLS {
            scope.spawn(|| {
                let fault = objects.for_call().unwrap().take("images", "1").unwrap_err();
                assert_eq!(fault.code, "Unavailable");
                assert!(fault.message.contains("does not answer in time"), "{}", fault.message);
            });
        }
    });
    assert!(before.elapsed() < Duration::from_secs(3));
    let calls: Vec<_> = (0..CALLS).map(|_| objects.for_call().unwrap()).collect();
    assert_eq!(objects.for_call().err().unwrap().code, "Unavailable");
    drop(calls);
    objects.for_call().unwrap();
}

#[test]
fn what_a_server_says_is_not_for_accounts() {
    let runtime = runtime();
    for (answer, told) in [
        (
            "HTTP/1.1 403 Forbidden\r\ncontent-length: 18\r\nconnection: close\r\n\r\n<Id>AKIDPRIVATE</>",
            "denied",
        ),
        (
            "HTTP/1.1 418 No\r\ncontent-length: 18\r\nconnection: close\r\n\r\n<Id>AKIDPRIVATE</>",
            "it answers 418",
        ),
    ] {
        let fault = server(answer, &runtime).for_call().unwrap().take("images", "1").unwrap_err();
        assert!(fault.message.contains(told), "{}", fault.message);
        let put = server(answer, &runtime).put("images", "a", vec![1]).unwrap_err().to_string();
        assert!(put.contains(told), "{put}");
        for text in [fault.message.to_string(), put] {
            assert!(!text.contains("PRIVATE") && !text.contains("127.0.0.1"), "{text}");
        }
    }
}

#[test]
fn an_environment_may_have_what_is_no_text() {
    use std::os::unix::ffi::OsStringExt as _;
    let bad = || OsString::from_vec(vec![0xff]);
    let all = [("OTHER".into(), bad()), (bad(), "a".into()), ("AWS_REGION".into(), "home-1".into())];
    let said = environment(all.into_iter()).unwrap();
    assert_eq!(said, [(AmazonS3ConfigKey::Region, "home-1".into())]);
    assert!(environment([("AWS_REGION".into(), bad())].into_iter()).is_err());
}
