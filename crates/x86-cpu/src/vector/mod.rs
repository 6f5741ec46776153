//! Vector and x87 instructions.
