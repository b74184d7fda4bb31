//! AWS's own examples of signed requests, of requests' forms and of answers, which botocore's source package carries:
//! `make clients` fetches it and says by `HUTCH_BOTOCORE` where it is; without that these tests have nothing to do.

use std::fs;
use std::path::{Path, PathBuf};

use hutch_api::query::sigv4::{Authorization, Request};
use hutch_api::query::{Node, Params};
use jiff::Timestamp;
use serde_json::Value;

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

/// The cases of the EC2 protocol: each with the shapes it is of.
fn cases(kind: &str) -> Vec<(Value, Value)> {
    let Some(botocore) = std::env::var_os("HUTCH_BOTOCORE") else {
        eprintln!("HUTCH_BOTOCORE is not set: nothing to do");
        return Vec::new();
    };
    let path = Path::new(&botocore).join("tests/unit/protocols").join(kind).join("ec2.json");
    let suites: Vec<Value> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let of = |suite: &Value| {
        let cases = suite["cases"].as_array().unwrap().clone();
        cases.into_iter().map(|case| (suite["shapes"].clone(), case)).collect::<Vec<_>>()
    };
    let all: Vec<_> = suites.iter().flat_map(of).collect();
    assert!(all.len() >= 10, "{} cases of {kind}", all.len());
    all
}

/// What parameters become in a form, by the rule of names that tools/operations.py applies to EC2's own model.
fn flat(shapes: &Value, member: &Value, name: &str, value: &Value, all: &mut Vec<(String, Value)>) {
    let shape = &shapes[member["shape"].as_str().unwrap()];
    match value {
        Value::Object(values) => {
            for (key, value) in values {
                let below = &shape["members"][key];
                let upper = |text: &str| text[..1].to_uppercase() + &text[1..];
                let own = below["queryName"].as_str().map(str::to_owned);
                let own = own.unwrap_or_else(|| upper(below["locationName"].as_str().unwrap_or(key)));
                let whole = if name.is_empty() { own } else { format!("{name}.{own}") };
                flat(shapes, below, &whole, value, all);
            }
        }
        Value::Array(values) => {
            for (i, value) in values.iter().enumerate() {
                flat(shapes, &shape["member"], &format!("{name}.{}", i + 1), value, all);
            }
        }
        scalar => all.push((name.to_owned(), scalar.clone())),
    }
}

#[test]
fn awss_forms_are_read() {
    for (shapes, case) in cases("input") {
        let body = case["serialized"]["body"].as_str().unwrap();
        let params = Params::parse(body).unwrap();
        let mut wanted = Vec::new();
        flat(&shapes, &case["given"]["input"], "", &case["params"], &mut wanted);
        for (name, value) in &wanted {
            let text = params.str(name).unwrap_or_else(|| panic!("{body}: {name}"));
            match value.as_str() {
                // A blob is in base64; a time is a number in the case, and a text of one form or another on the wire.
                Some(value) if text != value => {
                    assert_eq!(params.blob(name).unwrap().unwrap(), value.as_bytes(), "{body}: {name}");
                }
                _ => {}
            }
        }
        // And nothing else, but for the token that clients make where the caller gives none.
        let given = params.flat().into_iter().map(|(name, _)| name);
        let more = |name: &String| !["Action", "Version", "Token"].contains(&name.as_str());
        let mut given: Vec<_> = given.filter(more).collect();
        let mut wanted: Vec<_> = wanted.into_iter().map(|(name, _)| name).filter(more).collect();
        given.sort();
        wanted.sort();
        assert_eq!(given, wanted, "{body}");
    }
}

/// An element as we would answer it: children of one name that lists give are items.
fn node(element: roxmltree::Node<'_, '_>) -> Node {
    let below: Vec<_> = element.children().filter(roxmltree::Node::is_element).collect();
    let name = |element: &roxmltree::Node<'_, '_>| element.tag_name().name().to_owned();
    match below.first().map(name).as_deref() {
        None => Node::Text(element.text().unwrap_or_default().into()),
        Some("item" | "member") => Node::list(below, node),
        Some(_) => below.iter().fold(Node::empty(), |all, child| all.with(name(child), node(*child))),
    }
}

/// Texts and names, as another program reads them.
fn told(element: roxmltree::Node<'_, '_>) -> String {
    let below: Vec<_> = element.children().filter(roxmltree::Node::is_element).collect();
    match below.is_empty() {
        true => element.text().unwrap_or_default().to_owned(),
        false => {
            let one = |child: &roxmltree::Node<'_, '_>| {
                // EC2's lists are of items, whatever other services call them.
                let name = child.tag_name().name().replace("member", "item");
                format!("<{name}>{}", told(*child))
            };
            below.iter().map(one).collect()
        }
    }
}

#[test]
fn awss_answers_are_written() {
    for (_, case) in cases("output") {
        let body = case["response"]["body"].as_str().unwrap();
        let theirs = roxmltree::Document::parse(body).unwrap();
        let mut ours = String::new();
        node(theirs.root()).write(&mut ours);
        let ours = roxmltree::Document::parse(&ours).unwrap();
        assert_eq!(told(ours.root()), told(theirs.root()), "{}", case["id"]);
    }
}
