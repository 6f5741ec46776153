//! Typed description of a virtual machine: validation, defaults, key=value options.
