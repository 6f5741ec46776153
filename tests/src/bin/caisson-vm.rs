//! The process that a test's machine lives in; a test starts it and moves machines from one to the next.

fn main() -> anyhow::Result<()> {
    caisson_tests::vm::serve()
}
