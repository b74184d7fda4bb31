//! The other end of the wire: signed calls, and their answers as JSON.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use hutch_api::query::sigv4;
use serde_json::{Map, Value};

/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The largest answer, in bytes.
const LARGEST: u64 = 256 << 20;
/// The API's version.
const VERSION: &str = "2016-11-15";

/// Where hutchd is, and who asks.
#[derive(clap::Args, Clone)]
pub struct Connection {
    /// Where hutchd listens.
    #[arg(long, value_name = "URL", env = "HUTCH_ENDPOINT", default_value = "http://127.0.0.1:8773")]
    pub endpoint: String,
    /// The region.
    #[arg(long, value_name = "REGION", env = "AWS_DEFAULT_REGION", default_value = "home-1")]
    pub region: String,
    /// Where hutchd keeps the administrator's access key, where AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY name none.
    #[arg(long, value_name = "DIR", env = "HUTCH_STATE", default_value = "/var/lib/hutch")]
    pub state: PathBuf,
}

/// An access key.
#[derive(serde::Deserialize)]
pub struct Key {
    /// Its id.
    pub id: String,
    /// Its secret.
    pub secret: String,
}

impl Connection {
    /// The access key of the environment, else the administrator's.
    pub fn key(&self) -> anyhow::Result<Key> {
        let named = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let (Some(id), Some(secret)) = (named("AWS_ACCESS_KEY_ID"), named("AWS_SECRET_ACCESS_KEY")) {
            return Ok(Key { id, secret });
        }
        let path = self.state.join("keys.json");
        let text = std::fs::read(&path).with_context(|| {
            format!(
                "no access key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or read {} (as root, once hutchd has started)",
                path.display()
            )
        })?;
        let keys: Vec<Key> =
            serde_json::from_slice(&text).with_context(|| format!("cannot read {}", path.display()))?;
        keys.into_iter().next().with_context(|| format!("{} holds no access key", path.display()))
    }
}

/// A caller.
pub struct Client {
    agent: ureq::Agent,
    at: Connection,
    key: Key,
}

impl Client {
    pub fn new(at: &Connection) -> anyhow::Result<Client> {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(LIMIT))
            .http_status_as_error(false)
            .proxy(None)
            .build();
        Ok(Client { agent: agent.into(), at: at.clone(), key: at.key()? })
    }

    /// Calls an operation of EC2.
    ///
    /// # Errors
    /// hutchd does not answer, or refuses: its words and EC2's code.
    pub fn call(&self, action: &str, params: &[(String, String)]) -> anyhow::Result<Value> {
        self.ask("ec2", action, params)
    }

    /// Calls an operation that is hutchd's own, beside EC2.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn own(&self, action: &str, params: &[(String, String)]) -> anyhow::Result<Value> {
        self.ask("hutch", action, params)
    }

    fn ask(&self, service: &str, action: &str, params: &[(String, String)]) -> anyhow::Result<Value> {
        let fixed = [("Action".to_owned(), action.to_owned()), ("Version".into(), VERSION.into())];
        let pairs = fixed.iter().chain(params);
        let form: Vec<_> =
            pairs.map(|(name, value)| format!("{}={}", sigv4::escape(name), sigv4::escape(value))).collect();
        let body = form.join("&");
        let host = self.at.endpoint.split_once("://").map_or(self.at.endpoint.as_str(), |(_, rest)| rest);
        let host = host.trim_end_matches('/');
        let signed =
            sigv4::sign(&self.key.id, &self.key.secret, &self.at.region, service, host, body.as_bytes());
        let mut request = self.agent.post(format!("{}/", self.at.endpoint.trim_end_matches('/')));
        for (name, value) in &signed {
            request = request.header(name.as_str(), value);
        }
        let what = || {
            format!(
                "hutchd does not answer at {}; is it running? (systemctl status hutchd)",
                self.at.endpoint
            )
        };
        let answer = request.content_type("application/x-www-form-urlencoded").send(body.as_bytes());
        let mut answer = answer.with_context(what)?;
        let text = answer.body_mut().with_config().limit(LARGEST).read_to_string().with_context(what)?;
        let document = roxmltree::Document::parse(&text).with_context(|| {
            format!("{} is not hutchd's: it answers with something else", self.at.endpoint)
        })?;
        let root = json(document.root_element());
        if answer.status() != 200 {
            let error = &root["Errors"]["Error"];
            bail!("{} ({})", text_of(&error["Message"]), text_of(&error["Code"]));
        }
        Ok(root)
    }

    /// Calls an operation that answers in pages, and returns the members of `list` of them all.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn all(&self, action: &str, params: &[(String, String)], list: &str) -> anyhow::Result<Vec<Value>> {
        let mut params = params.to_vec();
        // Who asks by ids gets them all at once.
        if !params.iter().any(|(name, _)| name.ends_with("Id.1")) {
            params.push(("MaxResults".into(), "1000".into()));
        }
        let mut all = Vec::new();
        loop {
            let mut answer = self.call(action, &params)?;
            if let Value::Array(items) = answer[list].take() {
                all.extend(items);
            }
            let token = text_of(&answer["nextToken"]).to_owned();
            if token.is_empty() {
                return Ok(all);
            }
            params.retain(|(name, _)| name != "NextToken");
            params.push(("NextToken".into(), token));
        }
    }
}

/// A text of an answer; empty where it is not there.
pub fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The members of a list of an answer.
pub fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// An element: a list where all below are called `item`, else its members by name, else its text.
fn json(element: roxmltree::Node<'_, '_>) -> Value {
    let below: Vec<_> = element.children().filter(roxmltree::Node::is_element).collect();
    if below.is_empty() {
        return Value::String(element.text().unwrap_or_default().to_owned());
    }
    if below.iter().all(|child| child.tag_name().name() == "item") {
        return Value::Array(below.into_iter().map(json).collect());
    }
    let member = |child: roxmltree::Node<'_, '_>| (child.tag_name().name().to_owned(), json(child));
    Value::Object(below.into_iter().map(member).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_by_their_shape() {
        let text = "<R xmlns='x'><set><item><id>i-1</id><tagSet><item><key>Name</key><value>a &amp; b</value></item></tagSet></item>\
                    <item><id>i-2</id><tagSet/></item></set><nextToken/></R>";
        let read = json(roxmltree::Document::parse(text).unwrap().root_element());
        assert_eq!(items(&read["set"]).len(), 2);
        assert_eq!(text_of(&read["set"][0]["tagSet"][0]["value"]), "a & b");
        assert_eq!(items(&read["set"][1]["tagSet"]).len(), 0);
        assert_eq!(text_of(&read["nextToken"]), "");
        assert_eq!(text_of(&read["nothing"]["below"]), "");
    }
}
