//! Whether a machine is the one that was saved.

use caisson_machine::SavedMachine;

/// What differs between two states of one machine, in words; nothing if nothing does. Between two backends, what each
/// keeps in its own way may.
pub fn differences(before: &SavedMachine, after: &SavedMachine, same_backend: bool) -> Vec<String> {
    let mut found = Vec::new();
    let vcpus = before
        .parts()
        .iter()
        .filter(|(name, _)| is_vcpu(name))
        .count() as u32;
    for index in 0..vcpus {
        match (before.vcpu(index), after.vcpu(index)) {
            (Ok(before), Ok(after)) if same_backend => {
                lines(
                    &mut found,
                    index,
                    &format!("{before:#x?}"),
                    &format!("{after:#x?}"),
                );
            }
            (Ok(before), Ok(after)) => {
                found.extend(vcpu_differences(index, &before, &after));
            }
            (Err(error), _) | (_, Err(error)) => found.push(error.to_string()),
        }
    }
    for (name, record) in before.parts() {
        if is_vcpu(name) || (name == "machine" && !same_backend) {
            continue;
        }
        match after.parts().iter().find(|(other, _)| other == name) {
            None => found.push(format!("\"{name}\" is gone")),
            Some((_, other)) if other != record => {
                let same = record
                    .body()
                    .iter()
                    .zip(other.body())
                    .take_while(|(a, b)| a == b)
                    .count();
                found.push(format!(
                    "\"{name}\", {} bytes, from byte {same} on: {:02x?} became {:02x?}",
                    record.body().len(),
                    window(record.body(), same),
                    window(other.body(), same)
                ));
            }
            Some(_) => {}
        }
    }
    if before.parts().len() != after.parts().len() {
        found.push(format!(
            "{} parts became {}",
            before.parts().len(),
            after.parts().len()
        ));
    }
    found
}

fn window(bytes: &[u8], from: usize) -> &[u8] {
    let rest = bytes.get(from..).unwrap_or_default();
    rest.get(..16).unwrap_or(rest)
}

fn is_vcpu(name: &str) -> bool {
    name.strip_prefix("vcpu")
        .is_some_and(|index| index.parse::<u32>().is_ok())
}

fn lines(found: &mut Vec<String>, index: u32, before: &str, after: &str) {
    let mut field = String::new();
    for (a, b) in before.lines().zip(after.lines()) {
        if a.starts_with("    ") && !a.starts_with("     ") {
            field = a.trim().trim_end_matches(['{', '[', '(', ' ']).to_owned();
        }
        if a != b {
            found.push(format!(
                "vcpu{index}, {field}: {} became {}",
                a.trim(),
                b.trim()
            ));
        }
    }
    if before.lines().count() != after.lines().count() {
        found.push(format!("vcpu{index}: fields were lost or added"));
    }
}

/// Field by field, but for what backends keep each in their own way: which MSRs there are (each that both have must
/// be the same), how the vector area says that registers are as at power-on and how long it is, and the timer's
/// nanoseconds, which its count says too.
fn vcpu_differences(
    index: u32,
    before: &caisson_hypervisor::x86::VcpuState,
    after: &caisson_hypervisor::x86::VcpuState,
) -> Vec<String> {
    let mut found = Vec::new();
    let (mut a, mut b) = (before.clone(), after.clone());
    for msr in &a.msrs {
        if let Some(other) = b.msrs.iter().find(|other| other.index == msr.index)
            && other.value != msr.value
        {
            found.push(format!(
                "vcpu{index}, MSR {:#x}: {:#x} became {:#x}",
                msr.index, msr.value, other.value
            ));
        }
    }
    a.msrs.clear();
    b.msrs.clear();
    let len = a.xsave.area.len().max(b.xsave.area.len());
    for state in [&mut a, &mut b] {
        state.xsave.area.resize(len, 0);
        spell_out(&mut state.xsave.area);
        state.apic.timer_remaining_ns = None;
    }
    lines(&mut found, index, &format!("{a:#x?}"), &format!("{b:#x?}"));
    found
}

/// Replaces the bits of XSTATE_BV by what they stand for (SDM volume 1, 13.4 to 13.6): x87 and SSE registers whose bit
/// is clear are as at power-on. A processor may clear the bit of registers that are so, and need not.
fn spell_out(area: &mut [u8]) {
    const X87: std::ops::Range<usize> = 0..24;
    const ST: std::ops::Range<usize> = 32..160;
    const XMM: std::ops::Range<usize> = 160..416;
    const CONTROL_AT_POWER_ON: [u8; 2] = 0x037fu16.to_le_bytes();
    let Some((legacy, header)) = area.split_at_mut_checked(512) else {
        return;
    };
    let Some(xstate) = header.first_mut() else {
        return;
    };
    if *xstate & 1 == 0 {
        legacy[X87].fill(0);
        legacy[X87.start..2].copy_from_slice(&CONTROL_AT_POWER_ON);
        legacy[ST].fill(0);
    }
    if *xstate & 2 == 0 {
        legacy[XMM].fill(0);
    }
    *xstate |= 3;
}
