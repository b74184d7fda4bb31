//! A call's parameters: a flat form, `Filter.1.Value.2=x`, as the tree that it means.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::Fault;

/// The deepest name.
const DEPTH: usize = 8;
/// The most names.
const NAMES: usize = 20_000;

/// A node of the tree: a text, or what is below it by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params {
    text: Option<String>,
    below: BTreeMap<String, Params>,
}

fn malformed(why: &str) -> Fault {
    Fault::new("MalformedQueryString", format!("The query string is malformed: {why}"))
}

/// Undoes a form's `%XX` and `+`.
pub(super) fn decode(text: &str) -> Result<String, Fault> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
                let (Some(high), Some(low)) = (digit(), digit()) else {
                    return Err(malformed("a % without two hexadecimal digits"));
                };
                (high * 16 + low) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| malformed("it is not UTF-8"))
}

impl Params {
    /// Reads a form.
    ///
    /// # Errors
    /// `MalformedQueryString`.
    pub fn parse(form: &str) -> Result<Params, Fault> {
        let mut root = Params::default();
        for (count, pair) in form.split('&').filter(|pair| !pair.is_empty()).enumerate() {
            if count >= NAMES {
                return Err(malformed("it has too many parameters"));
            }
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            root.insert(&decode(name)?, decode(value)?)?;
        }
        Ok(root)
    }

    fn insert(&mut self, name: &str, value: String) -> Result<(), Fault> {
        let parts: Vec<&str> = name.split('.').collect();
        if parts.len() > DEPTH || parts.iter().any(|part| part.is_empty()) {
            return Err(malformed(&format!("the name {name:?} is none")));
        }
        let mut at = self;
        for part in parts {
            if at.text.is_some() {
                return Err(malformed(&format!("{name} is below a parameter that has a value")));
            }
            at = at.below.entry(part.to_owned()).or_default();
        }
        if at.text.is_some() || !at.below.is_empty() {
            return Err(malformed(&format!("the parameter {name} is given more than once")));
        }
        at.text = Some(value);
        Ok(())
    }

    /// What is at a name with dots in it.
    pub fn sub(&self, name: &str) -> Option<&Params> {
        name.split('.').try_fold(self, |at, part| at.below.get(part))
    }

    /// The text at a name.
    pub fn str(&self, name: &str) -> Option<&str> {
        self.sub(name)?.text.as_deref()
    }

    /// Its own text.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// The text at a name.
    ///
    /// # Errors
    /// `MissingParameter`.
    pub fn required(&self, name: &str) -> Result<&str, Fault> {
        self.str(name).filter(|text| !text.is_empty()).ok_or_else(|| Fault::missing(name))
    }

    /// A number.
    ///
    /// # Errors
    /// `InvalidParameterValue`.
    pub fn int(&self, name: &str) -> Result<Option<i64>, Fault> {
        let number = |text: &str| text.parse().map_err(|_| Fault::value(name, text, "It is not an integer."));
        self.str(name).map(number).transpose()
    }

    /// A truth.
    ///
    /// # Errors
    /// `InvalidParameterValue`.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, Fault> {
        let truth = |text: &str| match text.to_ascii_lowercase().as_str() {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(Fault::value(name, text, "It is neither true nor false.")),
        };
        self.str(name).map(truth).transpose()
    }

    /// Bytes, in base64.
    ///
    /// # Errors
    /// `InvalidParameterValue`.
    pub fn blob(&self, name: &str) -> Result<Option<Vec<u8>>, Fault> {
        let Some(text) = self.str(name) else { return Ok(None) };
        let clean: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
        let bytes = BASE64_STANDARD.decode(clean);
        bytes.map(Some).map_err(|_| Fault::value(name, "…", "It is not base64."))
    }

    /// The members of a list, by their numbers.
    pub fn list(&self, name: &str) -> Vec<&Params> {
        let Some(list) = self.sub(name) else { return Vec::new() };
        let numbered = |(name, item): (&String, _)| Some((name.parse::<u32>().ok()?, item));
        let mut items: Vec<_> = list.below.iter().filter_map(numbered).collect();
        items.sort_by_key(|(number, _)| *number);
        items.into_iter().map(|(_, item)| item).collect()
    }

    /// The texts of a list.
    pub fn strings(&self, name: &str) -> Vec<String> {
        self.list(name).into_iter().filter_map(|item| item.text.clone()).collect()
    }

    /// The names right below.
    pub fn names(&self) -> impl Iterator<Item = (&str, &Params)> {
        self.below.iter().map(|(name, below)| (name.as_str(), below))
    }
}
