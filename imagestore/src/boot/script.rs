//! The grammar of GRUB's scripts (GRUB manual, "Writing full configuration files"): text to statements.
//!
//! Nothing is expanded or run here. Nesting is bounded, since both the parser and whoever walks its result recurse.

use super::BootError;

/// How deep blocks may nest; grub-mkconfig's go to 4.
const MAX_DEPTH: usize = 32;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Text that stands for itself.
    Text { text: String, quoted: bool },
    /// `$name` or `${name}`; unquoted, its value is split into words at white space.
    Variable { name: String, quoted: bool },
}

/// One word before expansion.
pub(super) type Word = Vec<Piece>;

/// One statement.
#[derive(Debug)]
pub(super) enum Statement {
    /// A command and its arguments.
    Command(Vec<Word>),
    /// Conditions with their blocks, tried in order; `else` is a block whose condition is empty, hence true.
    If(Vec<(Vec<Statement>, Vec<Statement>)>),
    /// `while` and, with `until`, the reverse.
    While { condition: Vec<Statement>, until: bool, body: Vec<Statement> },
    /// `for name in words`.
    For { name: String, words: Vec<Word>, body: Vec<Statement> },
    /// `function name { … }`.
    Function { name: String, body: Vec<Statement> },
    /// `menuentry` or `submenu`, with its arguments.
    Menu { submenu: bool, words: Vec<Word>, body: Vec<Statement> },
}

/// Parses a whole script.
pub(super) fn parse(text: &str) -> Result<Vec<Statement>, BootError> {
    let tokens = Lexer { rest: text, line: 1 }.tokens()?;
    Parser { tokens: tokens.into_iter().peekable(), line: 1 }.block(&[], 0).map(|(statements, _)| statements)
}

enum Token {
    Word(Word),
    Open,
    Close,
    /// A newline or `;`.
    End,
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
}

impl Lexer<'_> {
    fn tokens(mut self) -> Result<Vec<(usize, Token)>, BootError> {
        let mut tokens = Vec::new();
        while let Some(c) = self.peek() {
            let line = self.line;
            let token = match c {
                '\n' | ';' => Token::End,
                '{' => Token::Open,
                '}' => Token::Close,
                '#' => {
                    self.take_while(|c| c != '\n');
                    continue;
                }
                c if c.is_ascii_whitespace() => {
                    self.next();
                    continue;
                }
                _ => {
                    // A lone escaped newline gives a word without pieces: it only joins lines.
                    let word = self.word()?;
                    if !word.is_empty() {
                        tokens.push((line, Token::Word(word)));
                    }
                    continue;
                }
            };
            self.next();
            tokens.push((line, token));
        }
        Ok(tokens)
    }

    fn word(&mut self) -> Result<Word, BootError> {
        let mut word = Word::new();
        while let Some(c) = self.peek() {
            match c {
                '{' | '}' | ';' => break,
                c if c.is_ascii_whitespace() => break,
                '\\' => {
                    self.next();
                    match self.next() {
                        Some('\n') | None => {}
                        Some(c) => push(&mut word, c, true),
                    }
                }
                '\'' => {
                    self.next();
                    let text = self.take_while(|c| c != '\'');
                    self.closing('\'')?;
                    word.push(Piece::Text { text, quoted: true });
                }
                '"' => {
                    self.next();
                    self.double_quoted(&mut word)?;
                }
                '$' => self.variable(&mut word, false)?,
                c => {
                    self.next();
                    push(&mut word, c, false);
                }
            }
        }
        Ok(word)
    }

    /// The inside of double quotes, to the closing one.
    fn double_quoted(&mut self, word: &mut Word) -> Result<(), BootError> {
        // So that "" is a word, though an empty one.
        word.push(Piece::Text { text: String::new(), quoted: true });
        loop {
            match self.peek() {
                None | Some('"') => return self.closing('"'),
                Some('$') => self.variable(word, true)?,
                Some('\\') => {
                    self.next();
                    match self.next() {
                        Some('\n') | None => {}
                        Some(c @ ('$' | '"' | '\\')) => push(word, c, true),
                        Some(c) => {
                            push(word, '\\', true);
                            push(word, c, true);
                        }
                    }
                }
                Some(c) => {
                    self.next();
                    push(word, c, true);
                }
            }
        }
    }

    /// `$name`, `${name}`, `$1`, `$@`, `$?`; a `$` before anything else stands for itself.
    fn variable(&mut self, word: &mut Word, quoted: bool) -> Result<(), BootError> {
        self.next();
        let name = match self.peek() {
            Some('{') => {
                self.next();
                let name = self.take_while(|c| c != '}' && c != '\n');
                self.closing('}')?;
                name
            }
            Some(c @ ('@' | '*' | '#' | '?')) => {
                self.next();
                c.to_string()
            }
            Some(c) if c.is_ascii_digit() => self.take_while(|c| c.is_ascii_digit()),
            Some(c) if is_name(c) => self.take_while(is_name),
            _ => {
                push(word, '$', quoted);
                return Ok(());
            }
        };
        word.push(Piece::Variable { name, quoted });
        Ok(())
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn take_while(&mut self, want: impl Fn(char) -> bool) -> String {
        let mut taken = String::new();
        while let Some(c) = self.peek().filter(|c| want(*c)) {
            taken.push(c);
            self.next();
        }
        taken
    }

    fn closing(&mut self, mark: char) -> Result<(), BootError> {
        if self.next() == Some(mark) {
            return Ok(());
        }
        let what = if mark == '}' { "`${` is not closed" } else { "a quote is not closed" };
        Err(BootError::Syntax { line: self.line, what })
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Appends a character to the word's last piece, or begins a new one.
fn push(word: &mut Word, c: char, quoted: bool) {
    match word.last_mut() {
        Some(Piece::Text { text, quoted: last }) if *last == quoted => text.push(c),
        _ => word.push(Piece::Text { text: c.to_string(), quoted }),
    }
}

/// The word's text, if it is one that can be a keyword: not quoted, nothing to expand.
fn plain(word: &Word) -> Option<&str> {
    match word.as_slice() {
        [Piece::Text { text, quoted: false }] => Some(text),
        _ => None,
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<(usize, Token)>>,
    /// The line of the last token, for errors.
    line: usize,
}

impl Parser {
    /// Statements up to one of the words in `stop` ("}" for a brace), which is taken and given back; with none, to
    /// the end of the text.
    fn block(
        &mut self,
        stop: &[&'static str],
        depth: usize,
    ) -> Result<(Vec<Statement>, &'static str), BootError> {
        if depth > MAX_DEPTH {
            return self.fail("blocks are nested too deep");
        }
        let mut statements = Vec::new();
        loop {
            match self.next() {
                None if stop.is_empty() => return Ok((statements, "")),
                None => return self.fail("the text ends inside of a block"),
                Some(Token::End) => {}
                Some(Token::Close) if stop.contains(&"}") => return Ok((statements, "}")),
                Some(Token::Open | Token::Close) => return self.fail("a brace is out of place"),
                Some(Token::Word(word)) => {
                    if let Some(found) = stop.iter().find(|stop| plain(&word) == Some(**stop)) {
                        return Ok((statements, found));
                    }
                    statements.push(self.statement(word, depth)?);
                }
            }
        }
    }

    fn statement(&mut self, first: Word, depth: usize) -> Result<Statement, BootError> {
        let inner = depth + 1;
        Ok(match plain(&first) {
            Some("if") => self.conditional(inner)?,
            Some(keyword @ ("while" | "until")) => {
                let until = keyword == "until";
                let (condition, _) = self.block(&["do"], inner)?;
                let (body, _) = self.block(&["done"], inner)?;
                Statement::While { condition, until, body }
            }
            Some("for") => {
                let mut words = self.words().into_iter();
                let (name, keyword) = (words.next(), words.next());
                let Some(name) = name.as_ref().and_then(plain).map(str::to_owned) else {
                    return self.fail("`for` needs a name");
                };
                if keyword.as_ref().and_then(plain) != Some("in") {
                    return self.fail("`for` needs `in`");
                }
                self.block(&["do"], inner)?;
                let (body, _) = self.block(&["done"], inner)?;
                Statement::For { name, words: words.collect(), body }
            }
            Some("function") => {
                let words = self.words();
                let Some(name) = words.first().and_then(plain).map(str::to_owned) else {
                    return self.fail("`function` needs a name");
                };
                Statement::Function { name, body: self.braced(inner)? }
            }
            Some(keyword @ ("menuentry" | "submenu")) => {
                let submenu = keyword == "submenu";
                let words = self.words();
                Statement::Menu { submenu, words, body: self.braced(inner)? }
            }
            _ => {
                let mut words = vec![first];
                words.extend(self.words());
                Statement::Command(words)
            }
        })
    }

    fn conditional(&mut self, depth: usize) -> Result<Statement, BootError> {
        let mut arms = Vec::new();
        loop {
            let (condition, _) = self.block(&["then"], depth)?;
            let (body, end) = self.block(&["elif", "else", "fi"], depth)?;
            arms.push((condition, body));
            if end == "else" {
                let (body, _) = self.block(&["fi"], depth)?;
                arms.push((Vec::new(), body));
            }
            if end != "elif" {
                return Ok(Statement::If(arms));
            }
        }
    }

    fn braced(&mut self, depth: usize) -> Result<Vec<Statement>, BootError> {
        while self.tokens.next_if(|(_, token)| matches!(token, Token::End)).is_some() {}
        match self.next() {
            Some(Token::Open) => Ok(self.block(&["}"], depth)?.0),
            _ => self.fail("`{` is missing"),
        }
    }

    /// The words up to the end of the command or a brace.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some((line, Token::Word(word))) =
            self.tokens.next_if(|(_, token)| matches!(token, Token::Word(_)))
        {
            self.line = line;
            words.push(word);
        }
        words
    }

    fn next(&mut self) -> Option<Token> {
        let (line, token) = self.tokens.next()?;
        self.line = line;
        Some(token)
    }

    fn fail<T>(&self, what: &'static str) -> Result<T, BootError> {
        Err(BootError::Syntax { line: self.line, what })
    }
}
