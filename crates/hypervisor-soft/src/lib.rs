//! The software CPU backend: x86-64 on x86-64 with no hypervisor.
