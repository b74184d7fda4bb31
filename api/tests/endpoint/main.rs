//! The endpoint over real sockets: who says too much, too little or nonsense is told so, and nobody else notices.

mod client;
mod limits;
mod noise;

use std::io::Write;
use std::net::TcpStream;

use client::{exchange, hear, signed, signed_for, start};
use hutch_api::query::server::Limits;

#[test]
fn calls_are_answered_and_faults_are_told() {
    let address = start(Limits::default()).address;
    let said =
        exchange(address, &signed("Action=Echo&Version=2016-11-15&Text=a+%3Cb%3E", ""), "</EchoResponse>");
    assert!(said.starts_with("HTTP/1.1 200") && said.contains("<text>a &lt;b&gt;</text>"), "{said}");
    assert!(said.contains("<account>000000000001</account>") && said.contains("x-amzn-requestid"), "{said}");
    for (body, status, code) in [
        ("Action=Fail", "400", "<Code>InvalidParameterValue</Code>"),
        ("Action=Panic", "500", "<Code>InternalError</Code>"),
        ("Action=Echo&Version=2000-01-01", "400", "<Code>NoSuchVersion</Code>"),
        ("Version=2016-11-15", "400", "<Code>MissingAction</Code>"),
        ("Action=Echo&A=1&A=2", "400", "<Code>MalformedQueryString</Code>"),
        ("Action=Echo&A=%zz", "400", "<Code>MalformedQueryString</Code>"),
    ] {
        let said = exchange(address, &signed(body, ""), "</Response>");
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")) && said.contains(code), "{body}: {said}");
    }
}

#[test]
fn nothing_is_done_for_strangers() {
    let address = start(Limits::default()).address;
    let good = String::from_utf8(signed("Action=Echo", "")).unwrap();
    for (bytes, code) in [
        (good.replace("Action=Echo", "Action=Evil"), "SignatureDoesNotMatch"),
        (good.replace("AKID", "AKIX"), "AuthFailure"),
        (good.replace("X-Amz-Date: 2", "X-Amz-Date: 1"), "SignatureDoesNotMatch"),
        (good.replace("Host: h", "Host: i"), "SignatureDoesNotMatch"),
        (good.replace("Authorization", "Other"), "MissingAuthenticationToken"),
        (
            String::from_utf8(signed("Action=Echo", "X-Amz-Security-Token: x\r\n")).unwrap(),
            "SignatureDoesNotMatch",
        ),
    ] {
        let said = exchange(address, bytes.as_bytes(), "</Response>");
        assert!(said.contains(&format!("<Code>{code}</Code>")), "{bytes}: {said}");
    }
}

#[test]
fn who_says_too_much_or_nonsense_harms_nobody() {
    let address = start(Limits::default()).address;
    let large = signed(&format!("Action=Echo&Text={}", "x".repeat(2 << 20)), "");
    let said = exchange(address, &large, "</Response>");
    assert!(said.starts_with("HTTP/1.1 413"), "{}", &said[..said.len().min(300)]);
    // Somebody who never finishes, many times, while others are served.
    let slow: Vec<_> = (0..50)
        .map(|_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf").unwrap();
            stream
        })
        .collect();
    for nonsense in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "PUT / HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /../x HTTP/1.1\r\nHost: h\r\n\r\n",
    ] {
        let said = exchange(address, nonsense.as_bytes(), "</Response>");
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{nonsense:?}: {said}");
    }
    let threads: Vec<_> = (0..16)
        .map(|_| std::thread::spawn(move || exchange(address, &signed("Action=Echo", ""), "</EchoResponse>")))
        .collect();
    for thread in threads {
        assert!(thread.join().unwrap().starts_with("HTTP/1.1 200"));
    }
    assert!(
        exchange(address, b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", "ok\n").starts_with("HTTP/1.1 200")
    );
    drop(slow);
}

#[test]
fn each_service_tells_errors_in_its_own_form() {
    let address = start(Limits::default()).address;
    let good =
        String::from_utf8(signed_for("sts", "Action=GetCallerIdentity&Version=2011-06-15", "")).unwrap();
    let said = exchange(address, good.as_bytes(), "</GetCallerIdentityResponse>");
    assert!(
        said.contains("<GetCallerIdentityResult>") && said.contains("<ResponseMetadata><RequestId>"),
        "{said}"
    );
    for (bytes, code) in [
        (good.replace("AKID", "AKIX"), "AuthFailure"),
        (good.replace("Version=2011", "Version=2012"), "SignatureDoesNotMatch"),
        (String::from_utf8(signed_for("sts", "Action=Echo&Version=1", "")).unwrap(), "NoSuchVersion"),
        (String::from_utf8(signed_for("sts", "Action=Panic", "")).unwrap(), "InternalError"),
    ] {
        let said = exchange(address, bytes.as_bytes(), "Response>");
        assert!(said.contains("<ErrorResponse") && said.contains(&format!("<Code>{code}</Code>")), "{said}");
    }
}

#[test]
fn the_name_of_an_action_is_one() {
    let address = start(Limits::default()).address;
    for action in ["", "A%3E%3Cb%3E", "a.b", "%00", &"x".repeat(65)] {
        let said = exchange(address, &signed(&format!("Action={action}"), ""), "</Response>");
        assert!(said.contains("<Code>InvalidAction</Code>"), "{action}: {said}");
    }
}

#[test]
fn calls_in_one_breath_are_answered_in_their_order() {
    let address = start(Limits::default()).address;
    let mut stream = TcpStream::connect(address).unwrap();
    let both =
        [signed("Action=Slow", ""), signed("Action=Echo&Text=1", ""), signed("Action=Echo&Text=2", "")];
    stream.write_all(&both.concat()).unwrap();
    let said = hear(&mut stream, "<text>2</text>");
    let at = |what: &str| said.find(what).unwrap_or_else(|| panic!("no {what}: {said}"));
    assert!(at("</SlowResponse>") < at("<text>1</text>") && at("<text>1</text>") < at("<text>2</text>"));
}

#[test]
fn who_waits_to_go_on_is_told_to_or_told_why_not() {
    let address = start(Limits::default()).address;
    let call = String::from_utf8(signed("Action=Echo&Text=on", "Expect: 100-continue\r\n")).unwrap();
    let (head, body) = call.split_at(call.find("Action").unwrap());
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    assert!(hear(&mut stream, "\r\n\r\n").starts_with("HTTP/1.1 100"));
    stream.write_all(body.as_bytes()).unwrap();
    assert!(hear(&mut stream, "</EchoResponse>").contains("<text>on</text>"));
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(head.replace("AKID", "AKIX").as_bytes()).unwrap();
    assert!(hear(&mut stream, "</Response>").starts_with("HTTP/1.1 401"));
}
