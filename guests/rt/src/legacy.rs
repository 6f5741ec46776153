//! Protected mode without long mode, virtual-8086 mode and real mode.
