//! Answers: a tree of named texts and lists, as the XML that clients read.

use std::borrow::Cow;
use std::fmt::Write;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A text.
    Text(String),
    /// `<item>`s.
    List(Vec<Node>),
    /// Members by name.
    Map(Vec<(Cow<'static, str>, Node)>),
}

impl Node {
    /// No members.
    pub fn empty() -> Node {
        Node::Map(Vec::new())
    }

    /// With one member more.
    #[must_use]
    pub fn with(self, name: impl Into<Cow<'static, str>>, value: impl IntoNode) -> Node {
        let Node::Map(mut members) = self else { return self };
        members.extend(value.into_node().map(|node| (name.into(), node)));
        Node::Map(members)
    }

    /// A list of what each of these makes.
    pub fn list<T>(items: impl IntoIterator<Item = T>, make: impl FnMut(T) -> Node) -> Node {
        Node::List(items.into_iter().map(make).collect())
    }

    /// The member of this name.
    pub fn get(&self, name: &str) -> Option<&Node> {
        match self {
            Node::Map(members) => members.iter().find(|(have, _)| *have == name).map(|(_, node)| node),
            _ => None,
        }
    }

    /// Appends the node as XML.
    pub fn write(&self, out: &mut String) {
        match self {
            Node::Text(text) => escape(text, out),
            Node::List(items) => items.iter().for_each(|item| element("item", item, out)),
            Node::Map(members) => members.iter().for_each(|(name, node)| element(name, node, out)),
        }
    }
}

fn element(name: &str, node: &Node, out: &mut String) {
    // A String takes all that is written to it.
    let _ = write!(out, "<{name}>");
    node.write(out);
    let _ = write!(out, "</{name}>");
}

fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\r' => out.push_str("&#13;"),
            '\t' | '\n' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'.. => out.push(c),
            // XML 1.0 has no way to hold it (section 2.2).
            _ => out.push('\u{fffd}'),
        }
    }
}

/// What a member can be; `None` is left out.
pub trait IntoNode {
    /// The node.
    fn into_node(self) -> Option<Node>;
}

impl IntoNode for Node {
    fn into_node(self) -> Option<Node> {
        Some(self)
    }
}

impl<T: IntoNode> IntoNode for Option<T> {
    fn into_node(self) -> Option<Node> {
        self.and_then(T::into_node)
    }
}

macro_rules! text {
    ($($type:ty),*) => {$(
        impl IntoNode for $type {
            fn into_node(self) -> Option<Node> {
                Some(Node::Text(self.to_string()))
            }
        }
    )*};
}

text!(&str, &String, String, bool, u8, u16, u32, u64, i64, usize, f64, std::net::Ipv4Addr, ipnet::Ipv4Net);

/// `node! { "name": value, … }`: a map; members whose value is `None` are left out.
#[macro_export]
macro_rules! node {
    ($($name:literal: $value:expr),* $(,)?) => {{
        let mut members: Vec<(std::borrow::Cow<'static, str>, $crate::query::Node)> = Vec::new();
        $(members.extend($crate::query::xml::IntoNode::into_node($value).map(|node| ($name.into(), node)));)*
        $crate::query::Node::Map(members)
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMES: [&str; 3] = ["instanceId", "tagSet", "v2"];

    fn nodes() -> impl Strategy<Value = Node> {
        let text = any::<String>().prop_map(Node::Text);
        text.prop_recursive(4, 40, 5, |inner| {
            let list = proptest::collection::vec(inner.clone(), 1..5).prop_map(Node::List);
            let member = (proptest::sample::select(&NAMES[..]).prop_map(Cow::from), inner);
            prop_oneof![list, proptest::collection::vec(member, 1..5).prop_map(Node::Map)]
        })
    }

    /// Whether an element, as another program reads it, holds this node.
    fn holds(element: roxmltree::Node<'_, '_>, node: &Node) -> bool {
        let below: Vec<_> = element.children().filter(roxmltree::Node::is_element).collect();
        let named = |name: &str, node: &Node, have: &roxmltree::Node<'_, '_>| {
            have.tag_name().name() == name && holds(*have, node)
        };
        match node {
            Node::Text(text) => {
                let kept = |c| match c {
                    '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'.. => c,
                    _ => '\u{fffd}',
                };
                below.is_empty() && element.text().unwrap_or_default().chars().eq(text.chars().map(kept))
            }
            Node::List(items) => {
                items.len() == below.len()
                    && items.iter().zip(&below).all(|(item, have)| named("item", item, have))
            }
            Node::Map(members) => {
                members.len() == below.len()
                    && members.iter().zip(&below).all(|((name, member), have)| named(name, member, have))
            }
        }
    }

    proptest! {
        #[test]
        fn another_program_reads_what_was_written(node in nodes()) {
            let mut out = String::new();
            element("answer", &node, &mut out);
            let read = roxmltree::Document::parse(&out);
            prop_assert!(read.is_ok_and(|read| holds(read.root_element(), &node)), "{}", out);
        }
    }

    #[test]
    fn what_xml_has_no_way_to_hold_is_marked() {
        let mut out = String::new();
        Node::Text("\0a\u{1f}\r\n\t\u{fffe}<&>]]>\u{10ffff}".into()).write(&mut out);
        assert_eq!(out, "\u{fffd}a\u{fffd}&#13;\n\t\u{fffd}&lt;&amp;&gt;]]&gt;\u{10ffff}");
    }
}
