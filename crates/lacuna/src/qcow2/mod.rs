//! How a guest range becomes host ranges in a qcow2 image.

pub mod format;
