//! Which kernel parameter an address came from. Flow-insensitive: a register is what any of its definitions makes it,
//! so a mistake on one path is not hidden by another.

use std::collections::HashMap;
use std::mem::offset_of;

use crate::args::{TwoshotArgs, TwoshotScaleArgs};
use crate::parse::{Instruction, Kernel, registers};

/// A set of address parameters.
pub type Origins = u8;
pub const IN: Origins = 1;
pub const OUT: Origins = 2;
pub const WINDOWS: Origins = 4;
pub const MULTICAST: Origins = 8;
pub const CONTROL: Origins = 16;
/// A factor on the device.
pub const FACTOR: Origins = 32;

/// Whether a kernel is one of scale.cuh, which have another parameter.
pub fn scales(kernel: &Kernel) -> bool {
    kernel.name.starts_with("twoshot_scale_")
}

fn origin(kernel: &Kernel, offset: usize) -> Origins {
    const SCALES: [(usize, Origins); 3] = [
        (offset_of!(TwoshotScaleArgs, in_), IN),
        (offset_of!(TwoshotScaleArgs, out), OUT),
        (offset_of!(TwoshotScaleArgs, factor_address), FACTOR),
    ];
    const TABLE: [(usize, Origins); 5] = [
        (offset_of!(TwoshotArgs, in_), IN),
        (offset_of!(TwoshotArgs, out), OUT),
        (offset_of!(TwoshotArgs, windows), WINDOWS),
        (offset_of!(TwoshotArgs, multicast), MULTICAST),
        (offset_of!(TwoshotArgs, control), CONTROL),
    ];
    // A load may start anywhere inside the field.
    let table = if scales(kernel) { &SCALES[..] } else { &TABLE };
    table.iter().filter(|(field, _)| offset / 8 * 8 == *field).map(|(_, origin)| *origin).sum()
}

pub struct Taint<'a> {
    kernel: &'a Kernel,
    registers: HashMap<&'a str, Origins>,
    /// Registers that hold the address of the parameter block itself, plus an offset.
    parameter_addresses: HashMap<&'a str, usize>,
}

impl<'a> Taint<'a> {
    /// Fails where a parameter is reached in a way that this analysis cannot follow.
    pub fn of(kernel: &'a Kernel) -> Result<Self, String> {
        let mut taint = Self { kernel, registers: HashMap::new(), parameter_addresses: HashMap::new() };
        loop {
            let before = (taint.registers.clone(), taint.parameter_addresses.len());
            for instruction in &kernel.instructions {
                taint.step(instruction)?;
            }
            if before == (taint.registers.clone(), taint.parameter_addresses.len()) {
                return Ok(taint);
            }
        }
    }

    /// Origins of all registers in an operand.
    pub fn operand(&self, operand: &str) -> Origins {
        registers(operand).map(|register| self.registers.get(register).copied().unwrap_or(0)).fold(0, |a, b| a | b)
    }

    fn step(&mut self, instruction: &'a Instruction) -> Result<(), String> {
        let lost = |what: &str| Err(format!("line {}: {what}: {instruction:?}", instruction.line));
        if instruction.opcode.starts_with("ld.param") {
            let Some(offset) = instruction.address().and_then(|address| self.parameter_offset(address)) else {
                return lost("a parameter load from an unknown offset");
            };
            let width = if instruction.opcode.ends_with("32") { 4 } else { 8 };
            for (index, register) in registers(&instruction.operands[0]).enumerate() {
                *self.registers.entry(register).or_default() |= origin(self.kernel, offset + index * width);
            }
            return Ok(());
        }
        let of_block = |operand: &String| {
            operand.contains("_param_")
                || registers(operand).any(|register| self.parameter_addresses.contains_key(register))
        };
        let sources = if instruction.address().is_some() { 0 } else { 1 };
        let uses_block = instruction.operands.iter().skip(sources).any(of_block);
        if uses_block {
            let (target, offset) = match (instruction.base(), instruction.operands.as_slice()) {
                ("mov", [target, source]) => (target, self.parameter_offset(source)),
                // A place inside the block, by a number.
                ("add", [target, source, number]) => (target, self.parameter_offset(&format!("{source}+{number}"))),
                _ => return lost("the parameter block's address goes elsewhere"),
            };
            let Some(offset) = offset else { return lost("the parameter block's address is lost") };
            let before = self.parameter_addresses.insert(target, offset);
            return match before {
                Some(before) if before != offset => lost("two places in the parameter block have one name"),
                _ => Ok(()),
            };
        }
        match instruction.base() {
            // No target, or a target that is no address: a loaded word, a predicate.
            "st" | "ld" | "atom" | "red" | "multimem" | "setp" | "bra" | "bar" | "fence" | "ret" | "griddepcontrol" => {
                Ok(())
            }
            label if label.starts_with('$') => Ok(()),
            // The place within a line or two is no address: the compiler lets a register have what was shifted by it, and an
            // index at another time.
            "and"
                if instruction
                    .operands
                    .last()
                    .and_then(|mask| mask.parse().ok())
                    .is_some_and(|mask| (0..32).contains(&mask)) =>
            {
                Ok(())
            }
            _ => {
                let Some((target, mut sources)) = instruction.operands.split_first() else {
                    return lost("an instruction without operands that the lint does not know");
                };
                // By how many bits is no address either.
                if ["shf", "shl", "shr"].contains(&instruction.base())
                    && let [shifted @ .., _] = sources
                {
                    sources = shifted;
                }
                let origins = sources.iter().map(|source| self.operand(source)).fold(0, |a, b| a | b);
                for register in registers(target) {
                    *self.registers.entry(register).or_default() |= origins;
                }
                Ok(())
            }
        }
    }

    /// `kernel_param_0+40` or `%rd1+40`.
    fn parameter_offset(&self, address: &str) -> Option<usize> {
        let (base, offset) = address.split_once('+').unwrap_or((address, "0"));
        let offset: isize = offset.parse().ok()?;
        let of_block = base.strip_prefix(self.kernel.name.as_str()) == Some("_param_0");
        let start = if of_block { 0 } else { *self.parameter_addresses.get(base)? };
        start.checked_add_signed(offset)
    }
}
