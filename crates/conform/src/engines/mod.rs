//! Drivers that come with the kit.

mod lacuna;
mod qemu_io;

pub use lacuna::Lacuna;
pub use qemu_io::QemuIo;
