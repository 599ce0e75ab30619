//! PTX text as kernels of instructions: as much of the grammar as nvcc's output and our inline assembly use.

/// One entry function.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub name: String,
    pub instructions: Vec<Instruction>,
}

/// `@predicate opcode operand, operand, ...; // mark`, or a label, whose opcode is its name.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// Line of the file, from 1.
    pub line: usize,
    pub predicated: bool,
    pub opcode: String,
    pub operands: Vec<String>,
    /// What follows `not-an-arrival:` in a comment.
    pub mark: Option<String>,
}

impl Instruction {
    /// The first word of the opcode: `ld` of `ld.global.b32`.
    pub fn base(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    pub fn has(&self, modifier: &str) -> bool {
        self.opcode.split('.').any(|part| part == modifier)
    }

    /// The `[...]` operand, without the brackets.
    pub fn address(&self) -> Option<&str> {
        self.operands.iter().find_map(|operand| operand.strip_prefix('[')?.strip_suffix(']'))
    }
}

/// Registers in an operand: `%r1`, `[%rd2+16]`, `{%r1, %r2}`.
pub fn registers(operand: &str) -> impl Iterator<Item = &str> {
    operand
        .split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '%' | '_' | '.')))
        .filter(|word| word.starts_with('%'))
}

pub fn kernels(ptx: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut in_header = false;
    for (index, text) in ptx.lines().enumerate() {
        let (code, comment) = text.split_once("//").unwrap_or((text, ""));
        if let Some((_, rest)) = code.split_once(".entry ") {
            let name = rest.trim_end_matches(|c: char| c == '(' || c.is_whitespace());
            kernels.push(Kernel { name: name.into(), instructions: Vec::new() });
            in_header = true;
        }
        let Some(kernel) = kernels.last_mut() else { continue };
        if in_header {
            in_header = code.trim() != "{";
            continue;
        }
        let mark = comment.split_once("not-an-arrival:").map(|(_, mark)| mark.trim().to_owned());
        for statement in code.split(';') {
            // Braces here open or close a scope: no instruction starts with a vector.
            let mut text = statement.trim_start_matches(|c: char| c.is_whitespace() || c == '{' || c == '}').trim_end();
            let line = index + 1;
            if let Some((label, rest)) = text.split_once(':')
                && label.starts_with('$')
            {
                let opcode = label.to_owned();
                let label = Instruction { line, predicated: false, opcode, operands: Vec::new(), mark: None };
                kernel.instructions.push(label);
                text = rest.trim();
            }
            let predicated = text.starts_with('@');
            if predicated {
                text = text.split_once(char::is_whitespace).unwrap_or_default().1.trim();
            }
            if text.is_empty() || text.starts_with('.') {
                continue;
            }
            let (opcode, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            kernel.instructions.push(Instruction {
                line,
                predicated,
                opcode: opcode.to_owned(),
                operands: operands(rest),
                mark: mark.clone(),
            });
        }
    }
    kernels
}

/// Splits at the commas outside `{}` and `[]`.
fn operands(text: &str) -> Vec<String> {
    let mut depth = 0;
    text.split(|c| {
        depth += match c {
            '{' | '[' => 1,
            '}' | ']' => -1,
            _ => 0,
        };
        c == ',' && depth == 0
    })
    .map(|operand| operand.trim().to_owned())
    .filter(|operand| !operand.is_empty())
    .collect()
}
