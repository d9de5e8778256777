//! Reads the one declaration of each kernel: its signature in `kernels/*.cu`.
//!
//! Not a C++ parser: the shape `extern "C" __global__ void [__launch_bounds__(..)] name(parameters)` and nothing else is
//! accepted, with the parameter types that the two sides can both say, and a shape comment beside every pointer. Everything
//! else is a failure that names file and line, so that what Rust launches is always what CUDA compiles.

use std::fmt;

/// A type that has the same bits on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// `act_t`: f32 or bf16, by how the file is compiled.
    Act,
    F32,
    F64,
    Bf16,
    I32,
    U32,
    I64,
    U64,
    U16,
    U8,
}

impl Scalar {
    fn from_cuda(words: &[&str]) -> Option<Self> {
        Some(match words {
            ["act_t"] => Scalar::Act,
            ["float"] => Scalar::F32,
            ["double"] => Scalar::F64,
            ["__nv_bfloat16"] => Scalar::Bf16,
            ["int"] | ["int32_t"] => Scalar::I32,
            ["unsigned"] | ["unsigned", "int"] | ["uint32_t"] => Scalar::U32,
            ["long", "long"] | ["int64_t"] => Scalar::I64,
            ["unsigned", "long", "long"] | ["uint64_t"] => Scalar::U64,
            ["unsigned", "short"] | ["uint16_t"] => Scalar::U16,
            ["unsigned", "char"] | ["uint8_t"] => Scalar::U8,
            _ => return None,
        })
    }
    /// In the generated Rust; `A` is the activation type.
    pub fn rust(self) -> &'static str {
        match self {
            Scalar::Act => "A",
            Scalar::F32 => "f32",
            Scalar::F64 => "f64",
            Scalar::Bf16 => "bf16",
            Scalar::I32 => "i32",
            Scalar::U32 => "u32",
            Scalar::I64 => "i64",
            Scalar::U64 => "u64",
            Scalar::U16 => "u16",
            Scalar::U8 => "u8",
        }
    }
    /// In the generated C++.
    pub fn cuda(self) -> &'static str {
        match self {
            Scalar::Act => "act_t",
            Scalar::F32 => "float",
            Scalar::F64 => "double",
            Scalar::Bf16 => "__nv_bfloat16",
            Scalar::I32 => "int",
            Scalar::U32 => "unsigned",
            Scalar::I64 => "long long",
            Scalar::U64 => "unsigned long long",
            Scalar::U16 => "unsigned short",
            Scalar::U8 => "unsigned char",
        }
    }
}

/// How a parameter is passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A buffer; `mutable` without `const`, `optional` with `OPTIONAL`.
    Pointer { element: Scalar, mutable: bool, optional: bool },
    /// A number.
    Value(Scalar),
    /// A `KERNEL_ARGUMENT` struct.
    Struct(String),
}

/// One parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    pub name: String,
    pub kind: Kind,
    /// The comment beside it; every pointer has one.
    pub shape: Option<String>,
}

/// One kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub name: String,
    pub line: usize,
    pub parameters: Vec<Parameter>,
    /// First argument of `__launch_bounds__`, as written.
    pub max_threads: Option<String>,
}

impl Kernel {
    /// Does its signature depend on the activation type?
    pub fn uses_act(&self) -> bool {
        self.parameters
            .iter()
            .any(|p| matches!(p.kind, Kind::Pointer { element: Scalar::Act, .. } | Kind::Value(Scalar::Act)))
    }
}

/// A struct passed by value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argument {
    pub name: String,
    pub line: usize,
    pub fields: Vec<(String, Scalar)>,
}

/// What one file declares.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Declarations {
    pub kernels: Vec<Kernel>,
    pub arguments: Vec<Argument>,
}

/// Where and why a file could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub line: usize,
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.message)
    }
}

fn fail<T>(line: usize, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { line, message: message.into() })
}

#[derive(Debug, Clone, PartialEq)]
enum Text {
    Word(String),
    Mark(char),
    Quoted(String),
    Comment(String),
}

#[derive(Debug, Clone, PartialEq)]
struct Token {
    text: Text,
    line: usize,
}

/// Words, marks, strings and comments. Preprocessor directives are left out; one that makes a kernel is refused.
fn tokens(source: &str) -> Result<Vec<Token>, Failure> {
    let s = source.as_bytes();
    let mut out = Vec::new();
    let (mut i, mut line, mut at_line_start) = (0, 1, true);
    while i < s.len() {
        let start = i;
        match s[i] {
            b'\n' => {
                line += 1;
                at_line_start = true;
                i += 1;
                continue;
            }
            c if c.is_ascii_whitespace() => {
                i += 1;
                continue;
            }
            b'#' if at_line_start => {
                let first = line;
                while i < s.len() && (s[i] != b'\n' || s[i - 1] == b'\\') {
                    line += usize::from(s[i] == b'\n');
                    i += 1;
                }
                if source[start..i].contains("__global__")
                    && !source[start..i].starts_with("#define __global__")
                {
                    return fail(first, "a kernel made by a macro cannot be read: write its signature out");
                }
                continue;
            }
            b'/' if s.get(i + 1) == Some(&b'/') => {
                i = source[i..].find('\n').map_or(s.len(), |n| i + n);
                out.push(Token { text: Text::Comment(source[start + 2..i].trim().into()), line });
            }
            b'/' if s.get(i + 1) == Some(&b'*') => {
                let Some(n) = source[i + 2..].find("*/") else { return fail(line, "comment without end") };
                i += n + 4;
                out.push(Token { text: Text::Comment(source[start + 2..i - 2].trim().into()), line });
                line += source[start..i].matches('\n').count();
            }
            q @ (b'"' | b'\'') => {
                i += 1;
                while i < s.len() && s[i] != q {
                    i += if s[i] == b'\\' { 2 } else { 1 };
                }
                i = (i + 1).min(s.len());
                out.push(Token { text: Text::Quoted(source[start..i].into()), line });
            }
            c if c.is_ascii_alphanumeric() || c == b'_' => {
                while i < s.len() && (s[i].is_ascii_alphanumeric() || s[i] == b'_') {
                    i += 1;
                }
                out.push(Token { text: Text::Word(source[start..i].into()), line });
            }
            _ => {
                let c = source[i..].chars().next().expect("i is on a character");
                i += c.len_utf8();
                out.push(Token { text: Text::Mark(c), line });
            }
        }
        at_line_start = false;
    }
    Ok(out)
}

/// A position in the tokens of one file.
struct Cursor<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.at)
    }
    fn line(&self) -> usize {
        self.tokens.get(self.at.min(self.tokens.len().saturating_sub(1))).map_or(0, |t| t.line)
    }
    fn skip_comments(&mut self) {
        while matches!(self.peek(), Some(Token { text: Text::Comment(_), .. })) {
            self.at += 1;
        }
    }
    fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Some(Token { text: Text::Word(w), .. }) if w == word)
    }
    fn take_word(&mut self, what: &str) -> Result<String, Failure> {
        self.skip_comments();
        match self.peek() {
            Some(Token { text: Text::Word(w), .. }) => {
                self.at += 1;
                Ok(w.clone())
            }
            other => fail(self.line(), format!("wanted {what}, found {:?}", other.map(|t| &t.text))),
        }
    }
    fn take_mark(&mut self, mark: char, context: &str) -> Result<(), Failure> {
        self.skip_comments();
        match self.peek() {
            Some(Token { text: Text::Mark(m), .. }) if *m == mark => {
                self.at += 1;
                Ok(())
            }
            other => {
                fail(self.line(), format!("wanted `{mark}` {context}, found {:?}", other.map(|t| &t.text)))
            }
        }
    }
    /// The tokens up to the `)` that closes the `(` just taken.
    fn take_parenthesised(&mut self) -> Result<&'a [Token], Failure> {
        let (start, mut depth) = (self.at, 1);
        while let Some(t) = self.peek() {
            match t.text {
                Text::Mark('(') => depth += 1,
                Text::Mark(')') => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Ok(&self.tokens[start..self.at - 1]);
            }
        }
        fail(self.tokens[start.min(self.tokens.len() - 1)].line, "`(` without `)`")
    }
}

/// Kernels and argument structs of one file.
///
/// # Errors
/// The first declaration that is not of the accepted shape.
pub fn parse(source: &str) -> Result<Declarations, Failure> {
    let tokens = tokens(source)?;
    let mut cursor = Cursor { tokens: &tokens, at: 0 };
    let mut found = Declarations::default();
    while let Some(token) = cursor.peek() {
        cursor.at += 1;
        match &token.text {
            Text::Word(w) if w == "__global__" => {
                let before = |n: usize| cursor.at.checked_sub(n + 1).map(|i| &tokens[i].text);
                let quoted_c = matches!(before(1), Some(Text::Quoted(q)) if q == "\"C\"");
                if !quoted_c || !matches!(before(2), Some(Text::Word(w)) if w == "extern") {
                    return fail(token.line, "a kernel starts with: extern \"C\" __global__ void");
                }
                found.kernels.push(kernel(&mut cursor, token.line)?);
            }
            Text::Word(w) if w == "struct" && cursor.is_word("KERNEL_ARGUMENT") => {
                cursor.at += 1;
                found.arguments.push(argument(&mut cursor, token.line)?);
            }
            _ => {}
        }
    }
    Ok(found)
}

fn kernel(cursor: &mut Cursor<'_>, line: usize) -> Result<Kernel, Failure> {
    let mut max_threads = None;
    let mut returns_void = false;
    let name = loop {
        let word = cursor.take_word("the kernel's name")?;
        match word.as_str() {
            "void" => returns_void = true,
            "__launch_bounds__" => {
                cursor.take_mark('(', "after __launch_bounds__")?;
                let inside = cursor.take_parenthesised()?;
                let first = inside.split(|t| t.text == Text::Mark(',')).next().unwrap_or(inside);
                max_threads = Some(join(first));
            }
            _ => break word,
        }
    };
    if !returns_void {
        return fail(line, format!("kernel `{name}` does not return void"));
    }
    cursor.take_mark('(', &format!("after `{name}`"))?;
    let inside = cursor.take_parenthesised()?;
    // A comment after a comma, on the same line, belongs to the parameter before the comma.
    let mut parameters: Vec<Parameter> = Vec::new();
    let mut words: Vec<&Token> = Vec::new();
    let mut shape: Option<String> = None;
    let mut last_line = line;
    for token in inside {
        match &token.text {
            Text::Comment(text) => {
                if !text.starts_with('(') || token.line != last_line {
                    continue;
                }
                match parameters.last_mut() {
                    Some(p) if words.is_empty() => p.shape = Some(text.clone()),
                    _ => shape = Some(text.clone()),
                }
            }
            Text::Mark(',') => {
                parameters.push(parameter(&words, shape.take(), line)?);
                words.clear();
                last_line = token.line;
            }
            _ => {
                words.push(token);
                last_line = token.line;
            }
        }
    }
    if !words.is_empty() {
        parameters.push(parameter(&words, shape.take(), line)?);
    }
    if let Some(p) = parameters.iter().find(|p| p.shape.is_none() && matches!(p.kind, Kind::Pointer { .. })) {
        return fail(
            line,
            format!("kernel `{name}`: no shape beside pointer `{}`; write // (N, D) after it", p.name),
        );
    }
    Ok(Kernel { name, line, parameters, max_threads })
}

fn parameter(words: &[&Token], shape: Option<String>, line: usize) -> Result<Parameter, Failure> {
    let line = words.first().map_or(line, |t| t.line);
    let (mut constant, mut pointer, mut optional) = (false, false, false);
    let mut names: Vec<&str> = Vec::new();
    for token in words {
        match &token.text {
            Text::Word(w) if w == "const" => constant = true,
            Text::Word(w) if w == "OPTIONAL" => optional = true,
            Text::Word(w) if w == "__restrict__" || w == "GRID_CONSTANT" => {}
            Text::Mark('*') if !pointer => pointer = true,
            Text::Word(w) => names.push(w),
            other => return fail(line, format!("this is no kernel parameter: {other:?}")),
        }
    }
    let Some((name, kind)) = names.split_last() else { return fail(line, "empty parameter") };
    if kind.is_empty() {
        return fail(line, format!("parameter `{name}` has no type"));
    }
    let scalar = Scalar::from_cuda(kind);
    let kind = match (pointer, scalar, kind) {
        (true, Some(element), _) => Kind::Pointer { element, mutable: !constant, optional },
        (false, Some(scalar), _) => Kind::Value(scalar),
        (false, None, [one]) => Kind::Struct((*one).into()),
        _ => {
            return fail(line, format!("type `{}` of `{name}` has no counterpart in Rust", kind.join(" ")));
        }
    };
    if optional && !pointer {
        return fail(line, format!("OPTIONAL is for pointers, and `{name}` is none"));
    }
    Ok(Parameter { name: (*name).into(), kind, shape })
}

fn argument(cursor: &mut Cursor<'_>, line: usize) -> Result<Argument, Failure> {
    let name = cursor.take_word("the struct's name")?;
    cursor.take_mark('{', &format!("after `struct KERNEL_ARGUMENT {name}`"))?;
    let mut fields = Vec::new();
    loop {
        cursor.skip_comments();
        if matches!(cursor.peek(), Some(Token { text: Text::Mark('}'), .. })) {
            break;
        }
        let at = cursor.line();
        let mut words = vec![cursor.take_word("a field")?];
        while let Some(Token { text: Text::Word(_), .. }) = cursor.peek() {
            words.push(cursor.take_word("a field")?);
        }
        cursor.take_mark(';', &format!("after a field of `{name}`"))?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (field, kind) = words.split_last().expect("at least one word");
        match Scalar::from_cuda(kind) {
            Some(Scalar::Act) | None => {
                return fail(at, format!("field `{field}` of `{name}` is no number of fixed size"));
            }
            Some(scalar) => fields.push(((*field).into(), scalar)),
        }
    }
    Ok(Argument { name, line, fields })
}

/// The text of some tokens, for an expression that C++ evaluates.
fn join(tokens: &[Token]) -> String {
    let text = tokens.iter().map(|t| match &t.text {
        Text::Word(w) | Text::Quoted(w) => w.clone(),
        Text::Mark(m) => m.to_string(),
        Text::Comment(_) => String::new(),
    });
    text.collect::<Vec<_>>().join(" ")
}
