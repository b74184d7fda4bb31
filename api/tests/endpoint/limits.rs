//! Whoever connects may be anybody: what nobody may take for ever.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use super::client::{exchange, hear, signed, start};
use hutch_api::query::server::Limits;

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n";

/// Room for one, who must be quick.
fn narrow() -> Limits {
    Limits { connections: 1, patience: Duration::from_millis(300), ..Limits::default() }
}

#[test]
fn the_end_comes_also_while_all_connections_are_taken() {
    let patience = Duration::from_secs(3600);
    let limits = Limits { connections: 4, grace: Duration::from_millis(100), patience, ..Limits::default() };
    let mut served = start(limits);
    let mut taken: Vec<_> = (0..6).map(|_| TcpStream::connect(served.address).unwrap()).collect();
    for stream in &mut taken[..4] {
        stream.write_all(b"POST / HTTP/1.1\r\nHo").unwrap();
    }
    // The last two wait to be let in; the server waits for room.
    std::thread::sleep(Duration::from_millis(200));
    served.shut_down();
    served.ended();
}

#[test]
fn a_call_that_runs_is_answered_before_the_end() {
    let mut served = start(Limits::default());
    let mut stream = TcpStream::connect(served.address).unwrap();
    stream.write_all(&signed("Action=Slow", "")).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    served.shut_down();
    assert!(hear(&mut stream, "</SlowResponse>").starts_with("HTTP/1.1 200"));
    served.ended();
    assert!(TcpStream::connect(served.address).is_err());
}

#[test]
fn who_stalls_makes_room_for_others() {
    let served = start(narrow());
    for stall in [
        "",
        "POST / HT",
        "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf",
        "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha",
        // An answer, and then nothing.
        "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n",
    ] {
        let mut stalled = TcpStream::connect(served.address).unwrap();
        stalled.write_all(stall.as_bytes()).unwrap();
        assert!(exchange(served.address, HEALTH, "ok\n").starts_with("HTTP/1.1 200"), "{stall:?}");
    }
}

#[test]
fn who_takes_no_answer_makes_room_for_others() {
    let served = start(narrow());
    let mut deaf = TcpStream::connect(served.address).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    // Until neither side's buffers take any more.
    while deaf.write_all(&HEALTH.repeat(1000)).is_ok() {}
    assert!(exchange(served.address, HEALTH, "ok\n").starts_with("HTTP/1.1 200"));
}

#[test]
fn who_sends_too_much_hears_why() {
    let served = start(Limits::default());
    let large = signed(&format!("Action=Echo&Text={}", "x".repeat(4 << 20)), "");
    let stranger = String::from_utf8(large.clone()).unwrap().replace("AKID", "AKIX");
    for _ in 0..10 {
        let said = exchange(served.address, &large, "</Response>");
        assert!(said.starts_with("HTTP/1.1 413") && said.contains("RequestEntityTooLarge"), "{said}");
        let said = exchange(served.address, stranger.as_bytes(), "</Response>");
        assert!(said.starts_with("HTTP/1.1 401") && said.contains("AuthFailure"), "{said}");
    }
    let head = format!("GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "x".repeat(256 << 10));
    let said = exchange(served.address, head.as_bytes(), "\r\n\r\n");
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431"), "{said}");
}
