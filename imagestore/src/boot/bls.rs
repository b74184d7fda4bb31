//! Boot Loader Specification entries: `loader/entries/*.conf` (UAPI.1, "Type #1"), as Fedora and systemd-boot keep.

use std::cmp::Ordering;

use super::grub::Environment;
use super::{BootEntry, BootError, check_size};

/// The most entries that are looked at; a guest keeps a handful of kernels.
pub const MAX_ENTRIES: usize = 256;

/// One entry, as its file has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without `.conf` and without the boot counter.
    pub id: String,
    /// `title`, for people.
    pub title: String,
    /// `version` of the kernel.
    pub version: String,
    /// `sort-key`: the operating system's; empty where absent.
    pub sort_key: String,
    /// `machine-id`; empty where absent.
    pub machine_id: String,
    /// `linux`: the kernel's path; empty where the entry boots something else.
    pub linux: String,
    /// All `initrd` lines, in order.
    pub initrds: Vec<String>,
    /// All `options` lines, joined.
    pub options: String,
    /// The boot counter reached zero: every try failed, so the entry sorts last (UAPI.1, "Boot counting").
    pub bad: bool,
}

/// Reads one entry from its file's name and text. Unknown keys are skipped, as the specification asks.
///
/// # Errors
/// [`BootError::TooLarge`].
pub fn parse(file_name: &str, text: &str) -> Result<Entry, BootError> {
    check_size(text)?;
    let (id, bad) = split_counter(file_name.strip_suffix(".conf").unwrap_or(file_name));
    let mut entry = Entry { id: id.to_owned(), bad, ..Entry::default() };
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((line, ""));
        let value = value.trim();
        match key {
            "title" => value.clone_into(&mut entry.title),
            "version" => value.clone_into(&mut entry.version),
            "sort-key" => value.clone_into(&mut entry.sort_key),
            "machine-id" => value.clone_into(&mut entry.machine_id),
            "linux" => value.clone_into(&mut entry.linux),
            // Fedora's grubby writes "initrd a b"; the specification wants a line for each.
            "initrd" => entry.initrds.extend(value.split_ascii_whitespace().map(str::to_owned)),
            "options" => {
                if !entry.options.is_empty() {
                    entry.options.push(' ');
                }
                entry.options.push_str(value);
            }
            _ => {}
        }
    }
    Ok(entry)
}

/// Splits `name+LEFT` or `name+LEFT-DONE`: the name, and whether no try is left.
fn split_counter(name: &str) -> (&str, bool) {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some((id, counter)) = name.rsplit_once('+') else { return (name, false) };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    if is_number(left) && is_number(done) { (id, left.bytes().all(|b| b == b'0')) } else { (name, false) }
}

/// The entry that boots: the one `default` names, by id (as `saved_entry` has it), title, pattern of ids or place in the menu; else
/// the first of the menu. At most [`MAX_ENTRIES`] are considered. `$name` in `options` is taken from `variables`.
///
/// # Errors
/// [`BootError::NoEntry`] where there is none, [`BootError::NotLinux`] where the chosen one has no kernel.
pub fn choose(
    mut entries: Vec<Entry>,
    default: Option<&str>,
    variables: &Environment,
) -> Result<BootEntry, BootError> {
    entries.truncate(MAX_ENTRIES);
    entries.sort_by(menu_order);
    let default = default.map(|name| name.strip_suffix(".conf").unwrap_or(name));
    let chosen = default.and_then(|name| {
        let named = entries.iter().find(|entry| entry.id == name || entry.title == name);
        let named = named.or_else(|| entries.iter().find(|entry| matches(name, &entry.id)));
        named.or_else(|| name.parse().ok().and_then(|index: usize| entries.get(index)))
    });
    let entry = chosen.or(entries.first()).ok_or(BootError::NoEntry)?;

    let title = if entry.title.is_empty() { &entry.id } else { &entry.title };
    if entry.linux.is_empty() {
        return Err(BootError::NotLinux { title: title.clone() });
    }
    let initrds = entry.initrds.iter().map(|path| expand(path, variables));
    Ok(BootEntry {
        title: title.clone(),
        fs_uuid: None,
        kernel: absolute(&entry.linux),
        initrds: initrds.filter(|path| !path.is_empty()).map(|path| absolute(&path)).collect(),
        cmdline: expand(&entry.options, variables),
    })
}

/// What systemd-boot's `loader.conf` names as the default: a pattern of entries' names (loader.conf(5)).
pub fn loader_default(text: &str) -> Option<&str> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("default"));
    let mut values = lines.filter(|rest| rest.starts_with([' ', '\t'])).map(str::trim);
    values.rfind(|value| !value.is_empty())
}

/// Whether `name` matches a shell pattern with `*` and `?`; letters' case does not matter, as with systemd-boot.
fn matches(pattern: &str, name: &str) -> bool {
    // No file's name is longer.
    if pattern.len() > 255 {
        return false;
    }
    let (pattern, name) = (pattern.to_lowercase(), name.to_lowercase());
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some('?') => (p, n) = (p + 1, n + 1),
            Some(c) if name.get(n) == Some(c) => (p, n) = (p + 1, n + 1),
            // The last star takes one character more.
            _ => match star {
                Some((at, taken)) => {
                    (p, n) = (at + 1, taken + 1);
                    star = Some((at, taken + 1));
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Replaces `$name` words by GRUB's variables, which are not expanded again.
fn expand(text: &str, variables: &Environment) -> String {
    let words = text.split_ascii_whitespace().map(|word| match word.strip_prefix('$') {
        Some(name) => variables.get(name).map_or("", String::as_str),
        None => word,
    });
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The menu's order (UAPI.1, "Sorting"): the newest first.
fn menu_order(a: &Entry, b: &Entry) -> Ordering {
    let keyed = |entry: &Entry| !entry.sort_key.is_empty();
    a.bad
        .cmp(&b.bad)
        .then_with(|| keyed(b).cmp(&keyed(a)))
        .then_with(|| if keyed(a) && keyed(b) { by_sort_key(a, b) } else { Ordering::Equal })
        .then_with(|| compare_versions(&b.id, &a.id))
}

fn by_sort_key(a: &Entry, b: &Entry) -> Ordering {
    a.sort_key
        .cmp(&b.sort_key)
        .then_with(|| a.machine_id.cmp(&b.machine_id))
        .then_with(|| compare_versions(&b.version, &a.version))
}

/// Compares versions (UAPI.10): `~` before the end, the end before `-`, `^` and `.`, those before numbers and
/// letters; numbers by value.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_separators(a);
        b = skip_separators(b);

        for mark in [Some(b'~'), None, Some(b'-'), Some(b'^'), Some(b'.')] {
            let Some(mark) = mark else {
                if a.is_empty() || b.is_empty() {
                    return a.len().min(1).cmp(&b.len().min(1));
                }
                continue;
            };
            match (a.strip_prefix(&[mark]), b.strip_prefix(&[mark])) {
                (Some(rest_a), Some(rest_b)) => (a, b) = (rest_a, rest_b),
                (Some(_), None) => return Ordering::Less,
                (None, Some(_)) => return Ordering::Greater,
                (None, None) => {}
            }
        }

        let digits = a.first().is_some_and(u8::is_ascii_digit) || b.first().is_some_and(u8::is_ascii_digit);
        let (part_a, rest_a) = split_run(a, digits);
        let (part_b, rest_b) = split_run(b, digits);
        let order = if digits { compare_numbers(part_a, part_b) } else { part_a.cmp(part_b) };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// Skips what no version is made of.
fn skip_separators(text: &[u8]) -> &[u8] {
    let valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    let start = text.iter().position(valid).unwrap_or(text.len());
    text.split_at(start).1
}

/// The leading digits, or the leading letters, and the rest.
fn split_run(text: &[u8], digits: bool) -> (&[u8], &[u8]) {
    let same = |byte: &u8| if digits { byte.is_ascii_digit() } else { byte.is_ascii_alphabetic() };
    text.split_at(text.iter().position(|byte| !same(byte)).unwrap_or(text.len()))
}

/// Compares decimal numbers of any length.
fn compare_numbers(a: &[u8], b: &[u8]) -> Ordering {
    let significant = |text| split_at_first(text, |byte| byte != b'0');
    let (a, b): (&[u8], &[u8]) = (significant(a), significant(b));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

fn split_at_first(text: &[u8], want: impl Fn(u8) -> bool) -> &[u8] {
    text.split_at(text.iter().position(|byte| want(*byte)).unwrap_or(text.len())).1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fedora(version: &str) -> Entry {
        let text = format!(
            "title Fedora Linux ({version}) 41 (Cloud Edition)\nversion {version}\n# a comment\n\
             linux /boot/vmlinuz-{version}\ninitrd /boot/initramfs-{version}.img $tuned_initrd\n\
             options root=UUID=1234 ro $tuned_params\noptions console=ttyS0\n\
             grub_users $grub_users\ngrub_class fedora\n"
        );
        parse(&format!("0123456789abcdef-{version}.conf"), &text).unwrap()
    }

    #[test]
    fn loader_conf_names_a_default_by_pattern() {
        assert_eq!(
            loader_default("timeout 3\ndefault old\n#default x\ndefault\tdebian-*\n"),
            Some("debian-*")
        );
        assert_eq!(loader_default("default-x y\ndefaults z\ndefault\n"), None);
        for (pattern, name, is) in [
            ("debian-*", "Debian-6.1", true),
            ("*", "", true),
            ("*-6.?", "a-6.1-6.2", true),
            ("a*b*c", "a-b-b-c", true),
            ("a?", "a", false),
            ("", "a", false),
            ("a*b", "a-b-c", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn the_newest_kernel_boots_by_default() {
        let entries = ["6.9.12-200.fc40", "6.11.4-301.fc41", "6.11.4-30.fc41"].map(fedora).to_vec();
        let entry = choose(entries, None, &Environment::new()).unwrap();
        assert_eq!(entry.title, "Fedora Linux (6.11.4-301.fc41) 41 (Cloud Edition)");
        assert_eq!(entry.kernel, "/boot/vmlinuz-6.11.4-301.fc41");
        assert_eq!(entry.initrds, ["/boot/initramfs-6.11.4-301.fc41.img"]);
        assert_eq!(entry.cmdline, "root=UUID=1234 ro console=ttyS0");
    }

    #[test]
    fn the_saved_entry_and_grubs_variables_are_used() {
        let entries = ["6.9.12-200.fc40", "6.11.4-301.fc41"].map(fedora).to_vec();
        let variables = Environment::from([("tuned_params".to_owned(), "isolcpus=1 nohz=on".to_owned())]);
        for default in ["0123456789abcdef-6.9.12-200.fc40", "1"] {
            let entry = choose(entries.clone(), Some(default), &variables).unwrap();
            assert_eq!(entry.kernel, "/boot/vmlinuz-6.9.12-200.fc40");
            assert_eq!(entry.cmdline, "root=UUID=1234 ro isolcpus=1 nohz=on console=ttyS0");
        }
        let gone = choose(entries, Some("removed"), &variables).unwrap();
        assert_eq!(gone.kernel, "/boot/vmlinuz-6.11.4-301.fc41");
    }

    #[test]
    fn entries_with_a_sort_key_come_first_and_bad_ones_last() {
        let entry = |name: &str, text: &str| parse(name, text).unwrap();
        let mut entries = vec![
            entry("zzz.conf", "linux /z"),
            entry("a-9+0-3.conf", "linux /bad\nsort-key a\nversion 9"),
            entry("a-1.conf", "linux /old\nsort-key a\nversion 1"),
            entry("a-2+2-1.conf", "linux new\nsort-key a\nversion 2"),
        ];
        assert_eq!(choose(entries.clone(), None, &Environment::new()).unwrap().kernel, "/new");
        entries.sort_by(menu_order);
        assert_eq!(entries.iter().map(|e| e.id.as_str()).collect::<Vec<_>>(), ["a-2", "a-1", "zzz", "a-9"]);
    }

    #[test]
    fn what_boots_no_linux_is_named() {
        assert_eq!(choose(Vec::new(), None, &Environment::new()), Err(BootError::NoEntry));
        let efi = parse("shell.conf", "title Shell\nefi /shell.efi").unwrap();
        assert_eq!(
            choose(vec![efi], None, &Environment::new()),
            Err(BootError::NotLinux { title: "Shell".to_owned() })
        );
    }

    /// The specification's own examples, from the oldest to the newest.
    #[test]
    fn versions_compare_as_the_specification_says() {
        for pair in
            ["122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1"]
                .windows(2)
        {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        for (a, b) in
            [("123.45-67.88", "123.45-67.89"), ("bar-123", "foo-123"), ("123a", "123b"), ("a", "a0")]
        {
            assert_eq!(compare_versions(a, b), Ordering::Less, "{a} {b}");
        }
        for (a, b) in [("_1_", "1"), ("1_", "1"), ("1.007", "1.7"), ("", "_")] {
            assert_eq!(compare_versions(a, b), Ordering::Equal, "{a} {b}");
        }
    }

    proptest! {
        #[test]
        fn versions_compare_alike_both_ways(a in "[0-9a-c~^._-]{0,12}", b in "[0-9a-c~^._-]{0,12}") {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        }

        #[test]
        fn versions_are_ordered(mut all in proptest::collection::vec("[01a~^.-]{0,5}", 3)) {
            all.sort_by(|a, b| compare_versions(a, b));
            prop_assert!(compare_versions(&all[0], &all[2]) != Ordering::Greater);
        }

        #[test]
        fn arbitrary_text_never_panics(name in any::<String>(), text in any::<String>()) {
            let entry = parse(&name, &text).unwrap();
            let _ = choose(vec![entry], Some(&name), &Environment::new());
        }
    }
}
