//! System instructions.
pub mod debug;
mod reset;
pub use reset::{reset, start_up};

use crate::{fault::Fault, flow::Flow, state::Cpu};
use iced_x86::{Code, Instruction};
/// Executes `insn`.
pub fn exec(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let _ = (cpu, insn);
    Err(Fault::ud())
}
/// Whether [`exec`] executes `code`.
pub fn handles(_code: Code) -> bool {
    false
}
