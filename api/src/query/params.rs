//! A call's parameters: a flat form, `Filter.1.Value.2=x`, as the tree that it means.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::Fault;

/// The deepest name.
const DEPTH: usize = 8;
/// The most nodes of the tree: a small form must not become a large tree.
const NODES: usize = 20_000;
/// The last number in a list.
const LAST: u32 = 10_000;

/// A node of the tree: a text, or what is below it by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params {
    text: Option<String>,
    /// By name, in order. A vector, as nearly all are short, and a map's node of one takes a kilobyte.
    below: Vec<(String, Params)>,
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

/// The number of a list's member: 1 to 10,000, written in one way only.
pub(super) fn index(name: &str) -> Option<u32> {
    let number: u32 = name.parse().ok().filter(|number| (1..=LAST).contains(number))?;
    name.starts_with(|first| matches!(first, '1'..='9')).then_some(number)
}

impl Params {
    /// Reads a form.
    ///
    /// # Errors
    /// `MalformedQueryString`.
    pub fn parse(form: &str) -> Result<Params, Fault> {
        let mut pairs = Vec::new();
        for pair in form.split('&').filter(|pair| !pair.is_empty()) {
            if pairs.len() >= NODES {
                return Err(malformed("it has too many parameters"));
            }
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            pairs.push((decode(name)?, decode(value)?));
        }
        Params::of(pairs)
    }

    /// The tree of these names and values.
    ///
    /// # Errors
    /// `MalformedQueryString`.
    pub fn of(mut pairs: Vec<(String, String)>) -> Result<Params, Fault> {
        // In the order of the tree: each goes to the end of what is there, a value before what is below it.
        pairs.sort_by(|(a, _), (b, _)| a.split('.').cmp(b.split('.')));
        let (mut root, mut nodes) = (Params::default(), 0);
        for (name, value) in pairs {
            root.append(&name, value, &mut nodes)?;
        }
        Ok(root)
    }

    fn append(&mut self, name: &str, value: String, nodes: &mut usize) -> Result<(), Fault> {
        let short = || name.chars().take(100).collect::<String>();
        if name.split('.').count() > DEPTH || name.split('.').any(str::is_empty) {
            return Err(malformed(&format!("the name {:?} is none", short())));
        }
        let mut at = self;
        for part in name.split('.') {
            if at.text.is_some() {
                return Err(malformed(&format!("{} is below a parameter that has a value", short())));
            }
            if at.below.last().is_none_or(|(last, _)| last != part) {
                *nodes += 1;
                if *nodes > NODES {
                    return Err(malformed("it has too many parameters"));
                }
                if at.below.is_empty() {
                    at.below.reserve_exact(1);
                }
                at.below.push((part.to_owned(), Params::default()));
            }
            let Some((_, last)) = at.below.last_mut() else { return Ok(()) };
            at = last;
        }
        if at.text.is_some() {
            return Err(malformed(&format!("the parameter {} is given more than once", short())));
        }
        at.text = Some(value);
        Ok(())
    }

    fn child(&self, name: &str) -> Option<&Params> {
        let place = self.below.binary_search_by(|(have, _)| have.as_str().cmp(name)).ok()?;
        self.below.get(place).map(|(_, below)| below)
    }

    /// What is at a name with dots in it.
    pub fn sub(&self, name: &str) -> Option<&Params> {
        name.split('.').try_fold(self, Params::child)
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
        let mut items: Vec<_> =
            list.below.iter().filter_map(|(name, item)| Some((index(name)?, item))).collect();
        items.sort_by_key(|(number, _)| *number);
        items.into_iter().map(|(_, item)| item).collect()
    }

    /// The texts of a list.
    pub fn strings(&self, name: &str) -> Vec<String> {
        self.list(name).into_iter().filter_map(|item| item.text.clone()).collect()
    }

    /// All values below, by their flat names.
    pub fn flat(&self) -> Vec<(String, String)> {
        fn walk(at: &Params, name: &str, all: &mut Vec<(String, String)>) {
            all.extend(at.text.iter().map(|text| (name.to_owned(), text.clone())));
            for (part, below) in &at.below {
                let whole = if name.is_empty() { part.clone() } else { format!("{name}.{part}") };
                walk(below, &whole, all);
            }
        }
        let mut all = Vec::new();
        walk(self, "", &mut all);
        all
    }

    /// What is here, and of `base` what has another name right below.
    pub fn over(&self, base: &Params) -> Params {
        let mut whole = self.clone();
        let more = base.below.iter().filter(|(name, _)| self.child(name).is_none());
        whole.below.extend(more.cloned());
        whole.below.sort_by(|(a, _), (b, _)| a.cmp(b));
        whole
    }

    /// The names right below.
    pub fn names(&self) -> impl Iterator<Item = (&str, &Params)> {
        self.below.iter().map(|(name, below)| (name.as_str(), below))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    fn code(form: &str) -> String {
        Params::parse(form).map_or_else(|fault| fault.code.into_owned(), |_| "fine".into())
    }

    #[test]
    fn a_form_is_a_tree() {
        let form = "Filter.1.Name=a&Filter.1.Value.10=z&Filter.1.Value.2=y+%2B&&Filter.3.Name=b&filter=c&Empty=&Bare";
        let params = Params::parse(form).unwrap();
        let filters = params.list("Filter");
        let names: Vec<_> = filters.iter().filter_map(|filter| filter.str("Name")).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(filters[0].strings("Value"), ["y +", "z"]);
        assert_eq!(
            (params.str("filter"), params.str("Empty"), params.str("Bare")),
            (Some("c"), Some(""), Some(""))
        );
        assert_eq!(params.str("Filter"), None);
        assert_eq!(params.sub("Filter.2"), None);
    }

    #[test]
    fn what_is_no_form_is_refused() {
        for bad in [
            "A=1&A=2",
            "A=1&A.B=2",
            "A=1&A-B=1&A.B=2",
            "A.B=2&A=1",
            "A.B=1&A.B=1",
            ".=1",
            "A.=1",
            ".A=1",
            "A..B=1",
            "=1",
            "A=%",
            "A=%4",
            "A=%zz",
            "A=%ff",
            "%80=1",
            "A.A.A.A.A.A.A.A.A=1",
        ] {
            assert_eq!(code(bad), "MalformedQueryString", "{bad}");
        }
        assert_eq!(code("A.A.A.A.A.A.A.A=1"), "fine");
    }

    #[test]
    fn a_tree_has_no_more_nodes_than_a_form_may_have_names() {
        let wide = |names: usize| (0..names).map(|i| format!("A.{i}=&")).collect::<String>();
        assert_eq!(code(&wide(NODES - 1)), "fine");
        assert_eq!(code(&wide(NODES)), "MalformedQueryString");
        let deep = |names: usize| (0..names).map(|i| format!("{i}.a.b.c.d.e.f.g=&")).collect::<String>();
        assert_eq!(code(&deep(NODES / 8)), "fine");
        assert_eq!(code(&deep(NODES / 8 + 1)), "MalformedQueryString");
    }

    #[test]
    fn a_lists_members_have_numbers() {
        assert_eq!(index("1"), Some(1));
        assert_eq!(index("10000"), Some(10_000));
        for none in ["", "0", "01", "+1", "-1", "1a", "\u{661}", "10001", "99999999999"] {
            assert_eq!(index(none), None, "{none}");
        }
        let params = Params::parse("A.0=0&A.01=1&A.+1=2&A.2=3&A.n=4").unwrap();
        assert_eq!(params.strings("A"), ["3"]);
    }

    fn escape(text: &str) -> String {
        text.bytes().map(|byte| format!("%{byte:02x}")).collect()
    }

    proptest! {
        #[test]
        fn any_form_is_survived(form in "[A-C.=&%+0-9\\PC]{0,60}") {
            let _ = Params::parse(&form);
        }

        #[test]
        fn what_is_in_a_form_is_in_the_tree(
            given in btree_map(vec("[A-Ca-c1-3é]{1,2}", 1..4), "\\PC{0,10}", 0..20),
            order in any::<u64>(),
        ) {
            // No name may be above another.
            let above = |a: &Vec<String>, b: &Vec<String>| a != b && b.starts_with(a);
            let given: Vec<_> = given.iter().filter(|(a, _)| !given.keys().any(|b| above(a, b))).collect();
            let mut pairs: Vec<_> =
                given.iter().map(|(name, text)| format!("{}={}", escape(&name.join(".")), escape(text))).collect();
            let turn = order as usize % pairs.len().max(1);
            pairs.rotate_left(turn);
            let params = Params::parse(&pairs.join("&")).unwrap();
            for (name, text) in &given {
                prop_assert_eq!(params.str(&name.join(".")), Some(text.as_str()));
            }
            pairs.reverse();
            prop_assert_eq!(Params::parse(&pairs.join("&")).unwrap(), params.clone());
            if let Some((name, _)) = given.first() {
                for more in [name.join("."), format!("{}.x", name.join("."))] {
                    pairs.push(format!("{}=", escape(&more)));
                    prop_assert!(Params::parse(&pairs.join("&")).is_err());
                    pairs.pop();
                }
            }
        }
    }
}
