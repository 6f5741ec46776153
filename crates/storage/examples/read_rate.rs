//! How fast the engine reads an image: `read_rate FILE FORMAT BLOCK DEPTH SECONDS MODE`, where MODE is `random` or
//! `sequential`. Prints operations and bytes per second, and processor time per operation in microseconds. For
//! `cargo xtask bench disk`.

use std::{
    cell::Cell,
    error::Error,
    rc::Rc,
    time::{Duration, Instant},
};

use caisson_memory::Pinned;
use caisson_storage::{
    DiskOptions, EngineKind, Layer, Runtime, file::CacheMode, open_image, runtime::local::join_all,
};

fn processor_time() -> Duration {
    // SAFETY: a structure of numbers, for which zeroes are values.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes the structure, which lives.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, format, block, depth, seconds, mode] = &arguments[..] else {
        return Err("usage: read_rate FILE FORMAT BLOCK DEPTH SECONDS random|sequential".into());
    };
    let (block, depth): (u64, usize) = (block.parse()?, depth.parse()?);
    let time = Duration::from_secs_f64(seconds.parse()?);
    let random = mode == "random";
    let mut options = DiskOptions::new(file);
    options.format = Some(format.parse()?);
    options.cache = CacheMode::Direct;
    let runtime = Runtime::new(EngineKind::Auto)?;
    runtime.block_on(async {
        let disk = open_image(&runtime, &options, false).await?;
        let blocks = disk.size() / block;
        let done = Rc::new(Cell::new(0u64));
        let next = Rc::new(Cell::new(0u64));
        let (start, before) = (Instant::now(), processor_time());
        let readers = (0..depth).map(|n| {
            let (disk, done, next) = (disk.clone(), done.clone(), next.clone());
            let reader = async move {
                let memory = Pinned::zeroed(block as usize);
                let mut state = n as u64 + 1;
                while start.elapsed() < time {
                    let number = if random {
                        // Xorshift: its own share of what is measured must be small.
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state % blocks
                    } else {
                        next.set(next.get() + 1);
                        (next.get() - 1) % blocks
                    };
                    disk.read(number * block, memory.clone()).await?;
                    done.set(done.get() + 1);
                }
                Ok(())
            };
            let reader: caisson_storage::runtime::LocalFuture<'_, std::io::Result<()>> =
                Box::pin(reader);
            reader
        });
        for read in join_all(readers.collect()).await {
            read?;
        }
        let elapsed = start.elapsed().as_secs_f64();
        let used = (processor_time() - before).as_secs_f64();
        let count = done.get() as f64;
        println!(
            "{:.0} {:.0} {:.2}",
            count / elapsed,
            count * block as f64 / elapsed,
            used * 1e6 / count
        );
        Ok(())
    })
}
