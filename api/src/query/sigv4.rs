//! AWS Signature Version 4: who signed a request, and that nobody changed it since.
//!
//! Both forms: in the `Authorization` header, and in the query of a presigned URL. The names are those of *Signature
//! Version 4 signing process* in AWS's general reference. Only the path `/` is served, so that nothing has to be normalised.

use hmac::{Hmac, Mac};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use sha2::{Digest, Sha256};

use super::Fault;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// How far a request's time may be from ours, in seconds.
const SKEW: i64 = 15 * 60;
/// The longest life of a presigned URL, in seconds.
const LONGEST: i64 = 7 * 24 * 3600;

/// A request as it came.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `GET` or `POST`.
    pub method: &'a str,
    /// Behind the `?`, as it came.
    pub query: &'a str,
    /// Lower-case names, and values as they came, in their order.
    pub headers: &'a [(String, String)],
    /// The body.
    pub body: &'a [u8],
}

/// What a request says of its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    /// The access key.
    pub access_key: String,
    /// `YYYYMMDD` of the credential scope.
    date: String,
    /// The region of the credential scope.
    pub region: String,
    /// The service of the credential scope.
    pub service: String,
    signed_headers: Vec<String>,
    signature: Vec<u8>,
    /// `YYYYMMDDTHHMMSSZ`.
    time: String,
    /// In the query: how many seconds it holds.
    expires: Option<i64>,
}

fn incomplete(why: &str) -> Fault {
    Fault::new(
        "IncompleteSignature",
        format!("The request signature does not conform to AWS standards: {why}"),
    )
}

impl Request<'_> {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// The names and values of the query, decoded.
    fn parameters(&self) -> Vec<(String, String)> {
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty());
        let split = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (unescape(name), unescape(value))
        };
        pairs.map(split).collect()
    }
}

impl Authorization {
    /// Reads what a request says of its signature.
    ///
    /// # Errors
    /// `MissingAuthenticationToken`, `IncompleteSignature`.
    pub fn read(request: &Request<'_>) -> Result<Authorization, Fault> {
        let parameters = request.parameters();
        let query =
            |name: &str| parameters.iter().find(|(have, _)| have == name).map(|(_, value)| value.clone());
        let (credential, headers, signature, time, expires);
        if let Some(header) = request.header("authorization") {
            if request.headers.iter().filter(|(name, _)| name == "authorization").count() > 1 {
                return Err(incomplete("more than one Authorization header"));
            }
            let rest = header
                .strip_prefix(ALGORITHM)
                .ok_or_else(|| incomplete("the algorithm is not AWS4-HMAC-SHA256"))?;
            let part = |name: &str| {
                let mut parts = rest.split(',').filter_map(|part| part.trim().split_once('='));
                let missing = || incomplete(&format!("the Authorization header has no {name}"));
                parts.find(|(have, _)| *have == name).map(|(_, value)| value.to_owned()).ok_or_else(missing)
            };
            (credential, headers, signature) =
                (part("Credential")?, part("SignedHeaders")?, part("Signature")?);
            // HTTP's own date will do where it is the only one.
            let date = || request.header("date").map(basic);
            time = request
                .header("x-amz-date")
                .map(str::to_owned)
                .or_else(date)
                .ok_or_else(|| incomplete("there is neither an X-Amz-Date nor a Date header"))?;
            expires = None;
        } else if query("X-Amz-Algorithm").is_some_and(|algorithm| algorithm == ALGORITHM) {
            let part =
                |name: &str| query(name).ok_or_else(|| incomplete(&format!("the query has no {name}")));
            (credential, headers) = (part("X-Amz-Credential")?, part("X-Amz-SignedHeaders")?);
            (signature, time) = (part("X-Amz-Signature")?, part("X-Amz-Date")?);
            let seconds = part("X-Amz-Expires")?.parse().ok().filter(|n| (1..=LONGEST).contains(n));
            expires = Some(seconds.ok_or_else(|| incomplete("X-Amz-Expires is 1 to 604800"))?);
        } else {
            return Err(Fault::new("MissingAuthenticationToken", "Request is missing Authentication Token"));
        }
        let scope: Vec<&str> = credential.split('/').collect();
        let [access_key, date, region, service, "aws4_request"] = scope.as_slice() else {
            return Err(incomplete("the credential is not KEY/DATE/REGION/SERVICE/aws4_request"));
        };
        let signature =
            unhex(&signature).ok_or_else(|| incomplete("the signature is not 64 hexadecimal digits"))?;
        let signed_headers: Vec<String> = headers.split(';').map(str::to_owned).collect();
        if !signed_headers.is_sorted()
            || signed_headers.iter().any(|h| h.is_empty() || *h != h.to_ascii_lowercase())
        {
            return Err(incomplete("the signed headers are not in order"));
        }
        Ok(Authorization {
            access_key: (*access_key).into(),
            date: (*date).into(),
            region: (*region).into(),
            service: (*service).into(),
            signed_headers,
            signature,
            time,
            expires,
        })
    }

    /// Whether `secret` signed the request, and not too long ago.
    ///
    /// # Errors
    /// `SignatureDoesNotMatch`, `RequestExpired`, `IncompleteSignature`.
    pub fn verify(&self, request: &Request<'_>, secret: &str, now: Timestamp) -> Result<(), Fault> {
        let mismatch = |why: &str| {
            Fault::new(
                "SignatureDoesNotMatch",
                format!(
                    "The request signature we calculated does not match the signature you provided. {why}"
                ),
            )
        };
        let time = DateTime::strptime("%Y%m%dT%H%M%SZ", &self.time);
        let time = time
            .and_then(|time| time.to_zoned(TimeZone::UTC))
            .map_err(|_| incomplete("X-Amz-Date is not YYYYMMDDTHHMMSSZ"))?;
        if !self.time.starts_with(&self.date) || self.date.len() != 8 {
            return Err(mismatch("The date of the credential is not that of the request."));
        }
        let age = now.as_second() - time.timestamp().as_second();
        if age < -SKEW || age > self.expires.unwrap_or(SKEW) {
            return Err(Fault::new(
                "RequestExpired",
                format!("Request has expired: it is from {}, and here it is {now}; set the clock", self.time),
            ));
        }
        // What is not signed can be changed: nothing that means something may be.
        let signed = |name: &str| self.signed_headers.iter().any(|have| have == name);
        if !signed("host") {
            return Err(mismatch("The host header is not signed."));
        }
        if self.expires.is_none() && request.header("x-amz-date").is_none() && !signed("date") {
            return Err(mismatch("The date header is not signed."));
        }
        if let Some((name, _)) =
            request.headers.iter().find(|(name, _)| name.starts_with("x-amz-") && !signed(name))
        {
            return Err(mismatch(&format!("The header {name} is not signed.")));
        }
        let body = hex(&Sha256::digest(request.body));
        if request.header("x-amz-content-sha256").is_some_and(|said| said != body) {
            return Err(mismatch("The body is not the one whose digest was sent."));
        }
        let canonical =
            self.canonical(request, &body).ok_or_else(|| mismatch("A signed header is missing."))?;
        // Takes the same time however much of it is right.
        self.mac(secret, &canonical)
            .verify_slice(&self.signature)
            .map_err(|_| mismatch("Check your AWS Secret Access Key and signing method."))
    }

    fn scope(&self) -> String {
        format!("{}/{}/{}/aws4_request", self.date, self.region, self.service)
    }

    /// The signature of a canonical request, to be told or compared.
    fn mac(&self, secret: &str, canonical: &str) -> Hmac<Sha256> {
        let digest = hex(&Sha256::digest(canonical));
        let text = format!("{ALGORITHM}\n{}\n{}\n{digest}", self.time, self.scope());
        mac(&signing_key(secret, &self.date, &self.region, &self.service), &text)
    }

    /// The canonical request.
    fn canonical(&self, request: &Request<'_>, body: &str) -> Option<String> {
        let mut parameters = request.parameters();
        parameters.retain(|(name, _)| self.expires.is_none() || name != "X-Amz-Signature");
        let mut query: Vec<_> =
            parameters.iter().map(|(name, value)| (escape(name), escape(value))).collect();
        query.sort();
        let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut headers = String::new();
        for name in &self.signed_headers {
            let values = request.headers.iter().filter(|(have, _)| have == name);
            let values: Vec<_> = values
                .map(|(_, value)| value.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
                .collect();
            if values.is_empty() {
                return None;
            }
            headers.push_str(&format!("{name}:{}\n", values.join(",")));
        }
        let (method, query, signed) = (request.method, query.join("&"), self.signed_headers.join(";"));
        Some(format!("{method}\n/\n{query}\n{headers}\n{signed}\n{body}"))
    }
}

/// Signs a POST of a form to `/` of `host`, now. Returns the headers to send along, in lower case: `host`, `x-amz-date` and
/// `authorization`.
pub fn sign(
    access_key: &str,
    secret: &str,
    region: &str,
    service: &str,
    host: &str,
    body: &[u8],
) -> Vec<(String, String)> {
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let mut headers = vec![("host".to_owned(), host.to_owned()), ("x-amz-date".into(), time.clone())];
    let said = Authorization {
        access_key: access_key.into(),
        date: time.chars().take(8).collect(),
        region: region.into(),
        service: service.into(),
        signed_headers: headers.iter().map(|(name, _)| name.clone()).collect(),
        signature: Vec::new(),
        time,
        expires: None,
    };
    let request = Request { method: "POST", query: "", headers: &headers, body };
    let canonical = said.canonical(&request, &hex(&Sha256::digest(body))).unwrap_or_default();
    let signature = hex(&said.mac(secret, &canonical).finalize().into_bytes());
    let scope = said.scope();
    let text = format!(
        "{ALGORITHM} Credential={access_key}/{scope}, SignedHeaders=host;x-amz-date, Signature={signature}"
    );
    headers.push(("authorization".into(), text));
    headers
}

/// An HTTP date (RFC 9110, section 5.6.7) as `YYYYMMDDTHHMMSSZ`; anything else stays, and is refused if it is not that.
fn basic(date: &str) -> String {
    let time = jiff::fmt::rfc2822::parse(date);
    time.map_or_else(|_| date.to_owned(), |time| time.timestamp().strftime("%Y%m%dT%H%M%SZ").to_string())
}

fn mac(key: &[u8], text: &str) -> Hmac<Sha256> {
    // HMAC takes a key of any length.
    let mut mac =
        <Hmac<Sha256> as Mac>::new_from_slice(key).unwrap_or_else(|_| unreachable!("HMAC takes any key"));
    mac.update(text.as_bytes());
    mac
}

fn signing_key(secret: &str, date: &str, region: &str, service: &str) -> Vec<u8> {
    let first = format!("AWS4{secret}").into_bytes();
    [date, region, service, "aws4_request"]
        .iter()
        .fold(first, |key, part| mac(&key, part).finalize().into_bytes().to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..32).map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()).collect()
}

/// RFC 3986's unreserved characters stay, all else is `%XX`.
/// Percent-encodes all but RFC 3986's unreserved characters, as signatures need it.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte.into()),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Undoes `%XX` and `+`; what is no such thing is taken as it is, and will not match.
fn unescape(text: &str) -> String {
    super::params::decode(text).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The documentation's example of a signing key.
    #[test]
    fn the_signing_key_is_awss() {
        let key = signing_key("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "20120215", "us-east-1", "iam");
        assert_eq!(hex(&key), "f4780e2d9f65fa895f9c67b32ce1baf0b0d8a43505a000a1a9e090d414db404d");
    }

    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    const TIME: &str = "20150830T123600Z";
    /// botocore's `get-vanilla`, `post-x-www-form-urlencoded` and `get-vanilla-query-order-key-case` of AWS's test suite.
    type Vector = (
        &'static str,
        &'static str,
        &'static str,
        &'static [(&'static str, &'static str)],
        &'static str,
        &'static str,
    );
    const VECTORS: &[Vector] = &[
        (
            "GET",
            "",
            "",
            &[],
            "host;x-amz-date",
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        (
            "POST",
            "",
            "Param1=value1",
            &[("content-type", "application/x-www-form-urlencoded")],
            "content-type;host;x-amz-date",
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        ),
        (
            "GET",
            "Param2=value2&Param1=value1",
            "",
            &[],
            "host;x-amz-date",
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
    ];

    fn headers(more: &[(&str, &str)], signed: &str, signature: &str) -> Vec<(String, String)> {
        let scope = "AKIDEXAMPLE/20150830/us-east-1/service/aws4_request";
        let header = format!("{ALGORITHM} Credential={scope}, SignedHeaders={signed}, Signature={signature}");
        let own = [("host", "example.amazonaws.com"), ("x-amz-date", TIME), ("authorization", &header)];
        own.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn at(offset: i64) -> Timestamp {
        Timestamp::from_second(1_440_938_160 + offset).unwrap()
    }

    #[test]
    fn the_vectors_of_awss_test_suite() {
        for (method, query, body, more, signed, signature) in VECTORS {
            let headers = headers(more, signed, signature);
            let request = Request { method, query, headers: &headers, body: body.as_bytes() };
            let authorization = Authorization::read(&request).unwrap();
            assert_eq!(authorization.access_key, "AKIDEXAMPLE");
            assert_eq!(authorization.verify(&request, SECRET, at(0)), Ok(()), "{method} {query} {body}");
            assert_eq!(authorization.verify(&request, SECRET, at(899)), Ok(()));
            let code = |request: &Request<'_>, secret: &str, now| {
                authorization.verify(request, secret, now).unwrap_err().code
            };
            assert_eq!(code(&request, SECRET, at(901)), "RequestExpired");
            assert_eq!(code(&request, SECRET, at(-901)), "RequestExpired");
            assert_eq!(code(&request, "another", at(0)), "SignatureDoesNotMatch");
            let changed = Request { body: b"Param1=value2", ..request };
            assert_eq!(code(&changed, SECRET, at(0)), "SignatureDoesNotMatch");
            let changed = Request { query: "Param1=x", ..request };
            assert_eq!(code(&changed, SECRET, at(0)), "SignatureDoesNotMatch");
            let mut moved = headers.clone();
            moved[0].1 = "example.org".into();
            assert_eq!(code(&Request { headers: &moved, ..request }, SECRET, at(0)), "SignatureDoesNotMatch");
            let mut more = headers.clone();
            more.push(("x-amz-security-token".into(), "unsigned".into()));
            assert_eq!(code(&Request { headers: &more, ..request }, SECRET, at(0)), "SignatureDoesNotMatch");
        }
    }

    fn code(request: &Request<'_>, now: Timestamp) -> String {
        let verified = Authorization::read(request).and_then(|said| said.verify(request, SECRET, now));
        verified.map_or_else(|fault| fault.code.into_owned(), |()| "fine".into())
    }

    /// Presigned by botocore's signer, for an hour.
    #[test]
    fn a_presigned_url_holds_for_its_time() {
        const CALL: &str =
            "Action=DescribeInstances&Version=2016-11-15&Filter.1.Value.1=a%20b%2Fc%2B%C3%A9~&Empty=";
        const SIGNED: &str = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fhome-1%2Fec2\
            %2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host";
        const SIGNATURE: &str = "af9fd195ad1b01a1d3b396e2ef53c64775f960352bb68a41b8b45da89383fd8a";
        let good = format!("{CALL}&{SIGNED}&X-Amz-Signature={SIGNATURE}");
        let host = [("host".to_owned(), "example.amazonaws.com".to_owned())];
        let told = |query: &str, headers: &[(String, String)], body: &str, offset| {
            code(&Request { method: "GET", query, headers, body: body.as_bytes() }, at(offset))
        };
        assert_eq!(told(&good, &host, "", 0), "fine");
        assert_eq!(told(&good, &host, "", 3600), "fine");
        assert_eq!(told(&good, &host, "", 3601), "RequestExpired");
        assert_eq!(told(&good, &host, "", -901), "RequestExpired");
        assert_eq!(told(&good, &host, "Action=Other", 0), "SignatureDoesNotMatch");
        assert_eq!(
            told(&good, &[host[0].clone(), ("x-amz-other".into(), "1".into())], "", 0),
            "SignatureDoesNotMatch"
        );
        // The order is nobody's, each part is somebody's.
        assert_eq!(told(&format!("{SIGNED}&X-Amz-Signature={SIGNATURE}&{CALL}"), &host, "", 0), "fine");
        for (from, to, why) in [
            ("DescribeInstances", "TerminateInstances", "SignatureDoesNotMatch"),
            ("&Empty=", "", "SignatureDoesNotMatch"),
            ("&Empty=", "&Empty=&More=1", "SignatureDoesNotMatch"),
            ("Expires=3600", "Expires=3601", "SignatureDoesNotMatch"),
            ("Expires=3600", "Expires=604801", "IncompleteSignature"),
            ("Expires=3600", "Expires=-1", "IncompleteSignature"),
            ("X-Amz-Expires=3600", "", "IncompleteSignature"),
            ("home-1", "home-2", "SignatureDoesNotMatch"),
            ("ec2%2F", "sts%2F", "SignatureDoesNotMatch"),
            ("F20150830%2F", "F20150831%2F", "SignatureDoesNotMatch"),
            ("SignedHeaders=host", "SignedHeaders=", "IncompleteSignature"),
            ("af9f", "af9e", "SignatureDoesNotMatch"),
            ("X-Amz-Algorithm=AWS4", "X-Amz-Algorithm=AWS5", "MissingAuthenticationToken"),
        ] {
            assert!(good.contains(from), "{from}");
            assert_eq!(told(&good.replacen(from, to, 1), &host, "", 0), why, "{from} -> {to}");
        }
        // A signed header, folded and trimmed.
        let query = "Action=X&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fhome-1%2Fec2%2F\
            aws4_request&X-Amz-Date=20150830T123600Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host%3Bx-amz-other\
            &X-Amz-Signature=82cb594de52ce005b1f3de8e1c7aa9636be64d09f6380edda3b9e9d8683648e3";
        let other = |value: &str| [host[0].clone(), ("x-amz-other".to_owned(), value.to_owned())];
        assert_eq!(told(query, &other("  a   b "), "", 0), "fine");
        assert_eq!(told(query, &other("a c"), "", 0), "SignatureDoesNotMatch");
        assert_eq!(told(query, &host, "", 0), "SignatureDoesNotMatch");
    }

    /// The signatures are computed by another program.
    #[test]
    fn https_own_date_will_do_if_it_is_signed() {
        let told = |signed: &str, date: &str, signature: &str| {
            let scope = "AKIDEXAMPLE/20150830/home-1/ec2/aws4_request";
            let said =
                format!("{ALGORITHM} Credential={scope}, SignedHeaders={signed}, Signature={signature}");
            let headers =
                [("host", "example.amazonaws.com"), ("date", date), ("authorization", said.as_str())];
            let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
            code(&Request { method: "POST", query: "", headers: &headers, body: b"Action=X" }, at(0))
        };
        let (signed, unsigned) = (
            "cdbf60b1b3c9f6927423962ddd774c39ac8620b49babfaaa56cd5ce2cf90f367",
            "8f4682edde91cde7cd1db3224e5108102375e11ea90a9e0829bca3e83ea1ce4f",
        );
        assert_eq!(told("date;host", "Sun, 30 Aug 2015 12:36:00 GMT", signed), "fine");
        assert_eq!(told("host", "Sun, 30 Aug 2015 12:36:00 GMT", unsigned), "SignatureDoesNotMatch");
        assert_eq!(told("date;host", "Sun, 30 Aug 2015 12:36:01 GMT", signed), "SignatureDoesNotMatch");
        assert_eq!(told("date;host", "Sun, 30 Aug 2015 11:36:00 GMT", signed), "RequestExpired");
        assert_eq!(told("date;host", "yesterday", signed), "IncompleteSignature");
    }

    /// The signatures are right, and computed by another program; what they leave out or say is not.
    #[test]
    fn a_signature_has_to_cover_the_host_and_the_bodys_digest_to_be_its_own() {
        let told = |signed: &str, digest: Option<&str>, signature: &str| {
            let scope = "AKIDEXAMPLE/20150830/home-1/ec2/aws4_request";
            let said =
                format!("{ALGORITHM} Credential={scope}, SignedHeaders={signed}, Signature={signature}");
            let headers =
                [("host", "example.amazonaws.com"), ("x-amz-date", TIME), ("authorization", said.as_str())];
            let digest = digest.map(|digest| ("x-amz-content-sha256", digest));
            let headers: Vec<_> = headers
                .into_iter()
                .chain(digest)
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            code(&Request { method: "POST", query: "", headers: &headers, body: b"Action=X" }, at(0))
        };
        assert_eq!(
            told("x-amz-date", None, "9a524d83cc7abccb65d2bce879aece45bf040b8ccc1cba41dcf3e8dbf4535655"),
            "SignatureDoesNotMatch"
        );
        let all = "host;x-amz-content-sha256;x-amz-date";
        assert_eq!(
            told(
                all,
                Some("3b173cc483d5aca8322d8211dc94655130607dbcb351953b49907bdb997ddc01"),
                "46c4fffb7d5fb71fc6395a373d515d13ef84e0c418fca70fda71c9b2ef088e4b"
            ),
            "fine"
        );
        assert_eq!(
            told(
                all,
                Some("28ddbcb2c17c5fcbd8f1c736049c3182865e7c67de054b5eca97c61e4dcd724e"),
                "808ec0c615dabcfcbf4a5e5707e8cdbe889384d5f478733f474d6a1d299e0108"
            ),
            "SignatureDoesNotMatch"
        );
    }

    #[test]
    fn what_is_no_authorization_is_told_so() {
        let read = |value: &str| {
            let headers =
                [("authorization".to_owned(), value.to_owned()), ("x-amz-date".into(), TIME.into())];
            Authorization::read(&Request { method: "POST", query: "", headers: &headers, body: b"" })
                .unwrap_err()
                .code
        };
        for bad in [
            "",
            "Basic x",
            "AWS4-HMAC-SHA256",
            "AWS4-HMAC-SHA256 Credential=a/b/c/d/aws4_request",
            "AWS4-HMAC-SHA256 Credential=a/b/c, SignedHeaders=host, Signature=00",
            "AWS4-HMAC-SHA256 Credential=a/b/c/d/aws4_request, SignedHeaders=host, Signature=zz",
        ] {
            assert_eq!(read(bad), "IncompleteSignature", "{bad}");
        }
        let none = Request { method: "GET", query: "Action=x", headers: &[], body: b"" };
        assert_eq!(Authorization::read(&none).unwrap_err().code, "MissingAuthenticationToken");
    }
}
