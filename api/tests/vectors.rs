//! AWS's own examples of signed requests, which botocore's source package carries: it is unpacked where `HUTCH_BOTOCORE`
//! says, or these tests have nothing to do.

use std::fs;
use std::path::{Path, PathBuf};

use hutch_api::query::sigv4::{Authorization, Request};
use jiff::Timestamp;

/// The secret and the time of all of them.
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const TIME: &str = "2015-08-30T12:36:00Z";

/// Every signed request below a directory.
fn requests(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            requests(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "sreq") {
            found.push(path);
        }
    }
}

#[test]
fn awss_signed_requests_hold() {
    let Some(botocore) = std::env::var_os("HUTCH_BOTOCORE") else {
        eprintln!("HUTCH_BOTOCORE is not set: nothing to do");
        return;
    };
    let (mut all, mut held, mut elsewhere) = (Vec::new(), 0, 0);
    requests(&Path::new(&botocore).join("tests/unit/auth/aws4_testsuite"), &mut all);
    for path in all {
        let (name, text) = (path.display(), fs::read_to_string(&path).unwrap());
        let (head, body) = text.split_once("\n\n").unwrap_or((&text, ""));
        // What is folded over lines is one value, as an HTTP parser has it.
        let mut lines = head.lines();
        let mut headers: Vec<(String, String)> = Vec::new();
        let (method, target) =
            lines.next().and_then(|line| line.strip_suffix(" HTTP/1.1")?.split_once(' ')).unwrap();
        for line in lines {
            match line.split_once(':') {
                Some((name, value)) if !line.starts_with(' ') => {
                    headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
                _ => headers.last_mut().unwrap().1.push_str(&format!(" {}", line.trim())),
            }
        }
        // One of them has an outdated signature there; the file beside it has the right one for all.
        let authorization = fs::read_to_string(path.with_extension("authz")).unwrap();
        headers.retain(|(name, _)| name != "authorization");
        headers.push(("authorization".into(), authorization.trim().to_owned()));
        let (at, query) = target.split_once('?').unwrap_or((target, ""));
        if at != "/" {
            elsewhere += 1;
            continue;
        }
        let request = Request { method, query, headers: &headers, body: body.as_bytes() };
        let now: Timestamp = TIME.parse().unwrap();
        let verified = Authorization::read(&request).and_then(|said| said.verify(&request, SECRET, now));
        if name.to_string().ends_with("post-sts-header-after.sreq") {
            // Its token is put in after the signature: ours takes none that nobody signed.
            assert_eq!(verified.unwrap_err().code, "SignatureDoesNotMatch", "{name}");
            continue;
        }
        assert_eq!(verified, Ok(()), "{name}");
        let other = Request { query: "Param1=other", ..request };
        assert!(Authorization::read(&other).unwrap().verify(&other, SECRET, now).is_err(), "{name}");
        held += 1;
    }
    // Only the path / is served.
    assert!(held >= 20, "{held} held, {elsewhere} are of other paths");
}
