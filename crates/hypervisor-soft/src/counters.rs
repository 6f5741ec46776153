//! What the software CPU did, for whoever works on it.

use std::{collections::BTreeMap, fmt, sync::Mutex};

use caisson_x86_cpu::{cache::CacheStats, state::Stats};

/// Collects what the vCPUs of a [`Soft`](crate::Soft) count, each time that they are asked for
/// their statistics.
#[derive(Debug, Default)]
pub struct Counters(Mutex<BTreeMap<usize, VcpuCounters>>);

/// What one vCPU has counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VcpuCounters {
    pub(crate) index: usize,
    /// Instructions retired, on any tier.
    pub(crate) retired: u64,
    pub(crate) core: Stats,
    pub(crate) cache: CacheStats,
    /// Bytes of decoded code.
    pub(crate) decoded: usize,
    /// Bytes of translated code, if any was to be made.
    pub(crate) native: Option<usize>,
}

impl Counters {
    pub(crate) fn publish(&self, counters: VcpuCounters) {
        let mut all = self.0.lock().unwrap_or_else(|e| e.into_inner());
        all.insert(counters.index, counters);
    }
}

impl fmt::Display for Counters {
    /// A few lines for each vCPU, by number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.0.lock().unwrap_or_else(|e| e.into_inner()).clone();
        for v in all.values() {
            write!(f, "{v}")?;
        }
        Ok(())
    }
}

impl fmt::Display for VcpuCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (core, cache) = (&self.core, &self.cache);
        let mut line = |name: &str, values: &[(u64, &str)]| {
            write!(f, "  {name:<14}")?;
            for (i, (value, what)) in values.iter().enumerate() {
                let separator = if i == 0 { "" } else { ", " };
                write!(f, "{separator}{value} {what}")?;
            }
            writeln!(f)
        };
        line(
            &format!("vCPU {}", self.index),
            &[(self.retired, "instructions retired")],
        )?;
        line(
            "decoded code",
            &[
                (cache.blocks_built, "blocks built"),
                (cache.instructions_decoded, "instructions"),
                (self.decoded as u64 >> 10, "KiB"),
                (cache.flushes, "times emptied"),
            ],
        )?;
        line(
            "look-ups",
            &[
                (cache.jump_hits, "in the jump cache"),
                (cache.lookups, "by physical address"),
                (cache.links, "links made"),
                (cache.invalidations, "pages of code invalidated"),
            ],
        )?;
        line(
            "TLB",
            &[
                (core.tlb_misses, "data misses"),
                (core.walks, "walks with those for code"),
                (core.tlb_flushes, "flushes"),
            ],
        )?;
        line(
            "events",
            &[
                (core.exceptions, "exceptions"),
                (core.interrupts, "interrupts"),
                (core.mmio, "device accesses"),
                (core.pio, "port accesses"),
            ],
        )?;
        let Some(bytes) = self.native else {
            return Ok(());
        };
        line(
            "native code",
            &[
                (cache.blocks_translated, "blocks translated"),
                (bytes as u64 >> 10, "KiB"),
                (cache.native_flushes, "times emptied"),
                (core.interpreted, "instructions interpreted for it"),
            ],
        )?;
        let left = &cache.native_left;
        line(
            "left it",
            &[
                (left.iter().sum(), "times"),
                (
                    left[0] + left[1],
                    "at a branch without a target yet or a request",
                ),
                (left[2], "for code that is looked up"),
                (left[3], "by an exception"),
                (left[4], "by HLT"),
                (left[5], "because of unmasked SIMD exceptions"),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_are_printed_by_number_with_what_they_counted() {
        let counters = Counters::default();
        for index in [1, 0] {
            counters.publish(VcpuCounters {
                index,
                retired: 1000 + index as u64,
                core: Stats::default(),
                cache: CacheStats {
                    native_left: [1, 2, 3, 4, 5, 6],
                    ..CacheStats::default()
                },
                decoded: 4096,
                native: (index == 1).then_some(8192),
            });
        }
        let text = counters.to_string();
        let (first, second) = text.split_once("vCPU 1").expect("both are there");
        assert!(first.contains("1000 instructions retired") && first.contains("4 KiB"));
        assert!(!first.contains("native") && second.contains("8 KiB"));
        assert!(second.contains("21 times, 3 at a branch"), "{second}");
    }
}
