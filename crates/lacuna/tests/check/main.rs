//! Checks and repairs of images made by QEMU's tools, held against QEMU's own check.

mod crash;
mod damage;
mod healthy;
mod images;
mod random;
mod repair;
