//! Assembly and lifecycle of a virtual machine.
