//! `grub.cfg`: a script, so it is run, with the few commands that decide what boots (GRUB manual, "Commands").
//!
//! grub-mkconfig's scripts choose the default entry by `if` blocks over the variables in `grubenv`, so parsing alone
//! would not do. All other commands (graphics, modules, time-outs) do nothing here and answer "false", as they do in
//! GRUB where the hardware is missing. The work is metered: each command and each expanded byte costs [`FUEL`].

use std::collections::{BTreeMap, HashMap};

use super::script::{self, Piece, Statement, Word};
use super::{BootEntry, BootError, check_size};

/// Steps and bytes that one configuration may use; grub-mkconfig's use a few thousand.
const FUEL: usize = 4 << 20;
/// How deep functions may call each other.
const MAX_CALLS: usize = 16;
/// How `search` names the file system it was asked for, in place of GRUB's `hd0,gpt1`.
const BY_UUID: &str = "fs-uuid/";

/// The variables of GRUB's environment block, by name.
pub type Environment = BTreeMap<String, String>;

/// What a grub.cfg chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// One of its own entries.
    Entry(BootEntry),
    /// The file runs `blscfg`: the entries are those of the Boot Loader Specification. The variables are needed to
    /// choose (`default`) and to expand options (`kernelopts`).
    Bls(Environment),
}

/// Reads `grubenv`: a signature line, `name=value` lines with backslash escapes, `#` padding to 1,024 bytes (GRUB
/// manual, "The GRUB environment block"). Other lines are skipped; a block of unreadable bytes is an empty one.
pub fn parse_environment(text: &str) -> Environment {
    let mut environment = Environment::new();
    for line in text.lines().take_while(|line| !line.starts_with("###")).take(1024) {
        if let Some((name, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            let mut escaped = false;
            let unescape = |c: &char| {
                escaped = *c == '\\' && !escaped;
                !escaped
            };
            environment.insert(name.to_owned(), value.chars().filter(unescape).collect());
        }
    }
    environment
}

/// Runs a grub.cfg and gives its default entry.
///
/// `environment` is `grubenv`'s content. A `next_entry` in it is followed, and GRUB would then clear it: a caller
/// that cannot write `grubenv` leaves it out, or the one-time choice holds for ever.
///
/// # Errors
/// Those of [`BootError`]; a default that names no entry falls back to the first, as in GRUB.
pub fn choose(text: &str, environment: &Environment) -> Result<Choice, BootError> {
    check_size(text)?;
    let statements = script::parse(text)?;
    let mut run = Run::new(environment);
    run.block(&statements, 0)?;
    if run.uses_bls {
        return Ok(Choice::Bls(run.variables.into_iter().collect()));
    }

    let wanted = run.get("default").to_owned();
    let mut wanted = Some(wanted.as_str());
    // Each round opens one submenu. A function may make submenus without end; the fuel does end.
    loop {
        let (name, rest) = wanted.map_or(("", None), split_submenu);
        let menu = std::mem::take(&mut run.menu);
        let chosen = pick(&menu, name).and_then(|index| menu.get(index)).ok_or(BootError::NoEntry)?;
        run.variables.insert("chosen".to_owned(), chosen.title.clone());
        run.block(chosen.body, 0)?;
        if !chosen.submenu {
            return run.into_entry(&chosen.title).map(Choice::Entry);
        }
        wanted = rest;
    }
}

/// Splits `1>2` into the entry of this menu and the rest for the submenu. A `>` in a title is written `>>`.
fn split_submenu(wanted: &str) -> (&str, Option<&str>) {
    let mut from = 0;
    while let Some(at) = wanted.get(from..).and_then(|rest| rest.find('>')).map(|at| at + from) {
        let after = wanted.get(at + 1..).unwrap_or_default();
        if !after.starts_with('>') {
            return (wanted.get(..at).unwrap_or_default(), Some(after));
        }
        from = at + 2;
    }
    (wanted, None)
}

/// The entry with this number, id or title; else the first.
fn pick(menu: &[Item<'_>], name: &str) -> Option<usize> {
    let name = name.trim();
    if let Some(index) = name.parse::<usize>().ok().filter(|index| *index < menu.len()) {
        return Some(index);
    }
    let title = name.replace(">>", ">");
    let named = menu.iter().position(|item| item.id.as_deref() == Some(&title) || item.title == title);
    named.or(if menu.is_empty() { None } else { Some(0) })
}

/// An entry of the menu, before it is run.
struct Item<'a> {
    title: String,
    id: Option<String>,
    submenu: bool,
    body: &'a [Statement],
}

/// What the `linux` and `initrd` commands loaded.
#[derive(Default)]
struct Loaded {
    kernel: Option<(String, Option<String>)>,
    cmdline: String,
    initrds: Vec<String>,
}

/// A running script.
struct Run<'a> {
    grubenv: &'a Environment,
    variables: HashMap<String, String>,
    functions: HashMap<&'a str, &'a [Statement]>,
    /// The arguments of the function that runs, `$1` first.
    arguments: Vec<String>,
    menu: Vec<Item<'a>>,
    loaded: Loaded,
    uses_bls: bool,
    succeeded: bool,
    fuel: usize,
}

impl<'a> Run<'a> {
    fn new(grubenv: &'a Environment) -> Self {
        // What GRUB 2.12's normal mode sets before it reads the file. No "efi" platform: firmware setup entries
        // would be of no use.
        let preset = [
            ("prefix", "/boot/grub"),
            ("grub_platform", "pc"),
            ("grub_cpu", "x86_64"),
            ("feature_menuentry_id", "y"),
            ("feature_menuentry_options", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_default_font_path", "y"),
            ("feature_all_video_module", "y"),
            ("feature_timeout_style", "y"),
            ("feature_200_final", "y"),
        ];
        Run {
            grubenv,
            variables: preset.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            functions: HashMap::new(),
            arguments: Vec::new(),
            menu: Vec::new(),
            loaded: Loaded::default(),
            uses_bls: false,
            succeeded: true,
            fuel: FUEL,
        }
    }

    fn get(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    fn burn(&mut self, amount: usize) -> Result<(), BootError> {
        self.fuel = self.fuel.checked_sub(amount).ok_or(BootError::Exhausted)?;
        Ok(())
    }

    fn block(&mut self, statements: &'a [Statement], calls: usize) -> Result<(), BootError> {
        for statement in statements {
            self.burn(1)?;
            match statement {
                Statement::Command(words) => self.command(words, calls)?,
                Statement::If(arms) => self.conditional(arms, calls)?,
                Statement::While { condition, until, body } => {
                    while self.condition(condition, calls)? != *until {
                        self.block(body, calls)?;
                    }
                }
                Statement::For { name, words, body } => {
                    for value in self.expand(words)? {
                        self.burn(1)?;
                        self.variables.insert(name.clone(), value);
                        self.block(body, calls)?;
                    }
                }
                Statement::Function { name, body } => {
                    self.functions.insert(name, body);
                    self.succeeded = true;
                }
                Statement::Menu { submenu, words, body } => {
                    let words = self.expand(words)?;
                    let id = words.iter().skip_while(|word| *word != "--id").nth(1).cloned();
                    let id = id.or_else(|| {
                        words.iter().find_map(|word| word.strip_prefix("--id=")).map(str::to_owned)
                    });
                    let title = words.into_iter().next().unwrap_or_default();
                    self.menu.push(Item { title, id, submenu: *submenu, body });
                    self.succeeded = true;
                }
            }
        }
        Ok(())
    }

    fn conditional(
        &mut self,
        arms: &'a [(Vec<Statement>, Vec<Statement>)],
        calls: usize,
    ) -> Result<(), BootError> {
        for (condition, body) in arms {
            if self.condition(condition, calls)? {
                return self.block(body, calls);
            }
        }
        self.succeeded = true;
        Ok(())
    }

    /// Whether the last command of a condition succeeds; an empty one does. Costs fuel even then, so that an empty
    /// loop ends.
    fn condition(&mut self, condition: &'a [Statement], calls: usize) -> Result<bool, BootError> {
        self.burn(1)?;
        self.succeeded = true;
        self.block(condition, calls)?;
        Ok(self.succeeded)
    }

    fn command(&mut self, words: &'a [Word], calls: usize) -> Result<(), BootError> {
        let words = self.expand(words)?;
        let Some((mut name, mut arguments)) = words.split_first() else { return Ok(()) };
        let negated = name == "!";
        if negated {
            let Some(rest) = arguments.split_first() else { return Ok(()) };
            (name, arguments) = rest;
        }
        if let Some(body) = self.functions.get(name.as_str()).copied() {
            self.call(body, arguments.to_vec(), calls)?;
        } else {
            self.succeeded = self.builtin(name, arguments)?;
        }
        self.succeeded ^= negated;
        Ok(())
    }

    fn call(&mut self, body: &'a [Statement], arguments: Vec<String>, calls: usize) -> Result<(), BootError> {
        if calls >= MAX_CALLS {
            return Err(BootError::Exhausted);
        }
        let callers = std::mem::replace(&mut self.arguments, arguments);
        let result = self.block(body, calls + 1);
        self.arguments = callers;
        result
    }

    /// Runs a command of GRUB's and tells whether it succeeded.
    fn builtin(&mut self, name: &str, arguments: &[String]) -> Result<bool, BootError> {
        Ok(match name {
            "set" => arguments.iter().all(|argument| self.assign(argument)),
            "unset" => {
                for argument in arguments {
                    self.variables.remove(argument);
                }
                true
            }
            "[" | "test" => {
                let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let words = words.strip_suffix(&["]"]).unwrap_or(&words);
                self.test(words)
            }
            "load_env" => {
                self.burn(self.grubenv.iter().map(|(name, value)| name.len() + value.len()).sum())?;
                self.variables.extend(self.grubenv.iter().map(|(name, value)| (name.clone(), value.clone())));
                true
            }
            "search" => self.search(arguments),
            "linux" | "linux16" | "linuxefi" => {
                let Some((path, parameters)) = arguments.split_first() else { return Ok(false) };
                let (device, path) = self.locate(path);
                let cmdline = parameters.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
                self.loaded = Loaded { kernel: Some((path, device)), cmdline, initrds: Vec::new() };
                true
            }
            "initrd" | "initrd16" | "initrdefi" => {
                self.loaded.initrds = arguments.iter().map(|path| self.locate(path).1).collect();
                self.loaded.kernel.is_some()
            }
            "blscfg" => {
                self.uses_bls = true;
                true
            }
            "true" | "insmod" | "export" | "echo" | "save_env" | "boot" | ":" => true,
            _ => self.assign(name),
        })
    }

    /// `name=value`.
    fn assign(&mut self, argument: &str) -> bool {
        let Some((name, value)) = argument.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return false;
        };
        self.variables.insert(name.to_owned(), value.to_owned());
        true
    }

    /// `search --fs-uuid --set=root UUID`: the only kind whose answer can be told without a disk.
    fn search(&mut self, arguments: &[String]) -> bool {
        let mut variable = "root";
        let mut by_uuid = false;
        let mut wanted = None;
        let mut words = arguments.iter().map(String::as_str).peekable();
        while let Some(word) = words.next() {
            match word {
                "--fs-uuid" | "-u" => by_uuid = true,
                "--set" | "-s" => variable = words.next().unwrap_or("root"),
                "--hint" => _ = words.next(),
                _ if word.starts_with("--set=") => variable = word.strip_prefix("--set=").unwrap_or("root"),
                _ if word.starts_with('-') => {}
                _ => wanted = Some(word),
            }
        }
        let Some(uuid) = wanted.filter(|_| by_uuid) else { return false };
        self.variables.insert(variable.to_owned(), format!("{BY_UUID}{uuid}"));
        true
    }

    /// The file system's UUID, if known, and the path in it, of `(device)/path` or a path on `$root`.
    fn locate(&self, path: &str) -> (Option<String>, String) {
        let (device, path) = path
            .strip_prefix('(')
            .and_then(|rest| rest.split_once(')'))
            .unwrap_or_else(|| (self.get("root"), path));
        let device = device.trim_start_matches('(').trim_end_matches(')');
        (device.strip_prefix(BY_UUID).map(str::to_owned), path.to_owned())
    }

    /// `test`: `-o` binds less than `-a`, which binds less than `!`.
    fn test(&self, words: &[&str]) -> bool {
        words
            .split(|word| *word == "-o")
            .any(|any| any.split(|word| *word == "-a").all(|one| self.holds(one)))
    }

    fn holds(&self, mut words: &[&str]) -> bool {
        let mut holds = true;
        while let ["!", rest @ ..] = words {
            holds = !holds;
            words = rest;
        }
        holds == self.plainly_holds(words)
    }

    fn plainly_holds(&self, words: &[&str]) -> bool {
        match words {
            [] => false,
            [word] => !word.is_empty(),
            ["-n", word] => !word.is_empty(),
            ["-z", word] => word.is_empty(),
            // The one file whose presence we know of.
            ["-s" | "-e" | "-f", path] => path.ends_with("/grubenv") && !self.grubenv.is_empty(),
            [left, operator, right] => {
                let numbers = left.parse::<i64>().ok().zip(right.parse::<i64>().ok());
                match *operator {
                    "=" | "==" => left == right,
                    "!=" => left != right,
                    "<" => left < right,
                    ">" => left > right,
                    "-eq" => numbers.is_some_and(|(left, right)| left == right),
                    "-ne" => numbers.is_some_and(|(left, right)| left != right),
                    "-lt" => numbers.is_some_and(|(left, right)| left < right),
                    "-le" => numbers.is_some_and(|(left, right)| left <= right),
                    "-gt" => numbers.is_some_and(|(left, right)| left > right),
                    "-ge" => numbers.is_some_and(|(left, right)| left >= right),
                    _ => false,
                }
            }
            _ => false,
        }
    }

    /// Expands variables; the value of an unquoted one is split into words.
    fn expand(&mut self, words: &[Word]) -> Result<Vec<String>, BootError> {
        let mut expanded = Vec::new();
        for word in words {
            let mut current: Option<String> = None;
            for piece in word {
                self.burn(1)?;
                match piece {
                    Piece::Text { text, .. } => {
                        self.burn(text.len())?;
                        current.get_or_insert_default().push_str(text);
                    }
                    Piece::Variable { name, quoted } => {
                        let value = self.value(name);
                        self.burn(value.len())?;
                        if *quoted {
                            current.get_or_insert_default().push_str(&value);
                            continue;
                        }
                        let starts_apart = value.starts_with(|c: char| c.is_ascii_whitespace());
                        let ends_apart = value.ends_with(|c: char| c.is_ascii_whitespace());
                        for (index, field) in value.split_ascii_whitespace().enumerate() {
                            if index > 0 || starts_apart {
                                expanded.extend(current.take());
                            }
                            current.get_or_insert_default().push_str(field);
                        }
                        if ends_apart {
                            expanded.extend(current.take());
                        }
                    }
                }
            }
            expanded.extend(current);
        }
        Ok(expanded)
    }

    fn value(&self, name: &str) -> String {
        match name {
            "@" | "*" => self.arguments.join(" "),
            "#" => self.arguments.len().to_string(),
            "?" => i32::from(!self.succeeded).to_string(),
            _ => match name.parse::<usize>() {
                Ok(number) => number
                    .checked_sub(1)
                    .and_then(|index| self.arguments.get(index))
                    .cloned()
                    .unwrap_or_default(),
                Err(_) => self.get(name).to_owned(),
            },
        }
    }

    fn into_entry(self, title: &str) -> Result<BootEntry, BootError> {
        let Some((kernel, fs_uuid)) = self.loaded.kernel else {
            return Err(BootError::NotLinux { title: title.to_owned() });
        };
        Ok(BootEntry {
            title: title.to_owned(),
            fs_uuid,
            kernel,
            initrds: self.loaded.initrds,
            cmdline: self.loaded.cmdline,
        })
    }
}

/// A parameter as GRUB hands it to the kernel: in quotes where it holds white space.
fn quote(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('\'', "\\'");
    if word.contains(|c: char| c.is_ascii_whitespace()) { format!("\"{escaped}\"") } else { escaped }
}

#[cfg(test)]
mod tests;
