//! A zero-aware virtual-disk engine for qcow2 images.
//!
//! A guest range travels down: [`block`] says what a guest may ask, [`qcow2`] turns guest ranges
//! into host ranges, [`storage`] moves the bytes. [`chain`] opens what an image names, under a
//! policy, and [`job`] does work on whole disks. Vocabulary shared by all is at the root.
//!
//! # For authors of virtual machine monitors
//!
//! All that a block device needs, from an empty file to a clean close. The engine is `async` and
//! knows no runtime: drive the futures with yours, or with [`blocking`]. An image is `Send + Sync`
//! and cheap to clone; many requests may be in flight, and a request's future may be dropped at
//! any time.
//!
//! ```
//! use lacuna::block::{DiscardMode, Layer, WriteFlags, ZeroFlags};
//! use lacuna::buffer::Buffer;
//! use lacuna::qcow2::check::{CheckOptions, check};
//! use lacuna::qcow2::{Access, CreateOptions, Image, OpenOptions, Parts, Shrink, create};
//! use lacuna::storage::{FileOptions, FileStorage};
//! use lacuna::units::{GuestOffset, GuestRange};
//!
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("disk.qcow2");
//! # pollster::block_on(async {
//! // Create: the same bytes as `qemu-img create`.
//! let file = FileStorage::open(&path, &FileOptions::replace())?;
//! let options = CreateOptions { size_bytes: 1 << 30, ..CreateOptions::default() };
//! create(&file, &options).await?;
//!
//! // Open: the caller hands in backing and data files; an image never opens what it names.
//! let image = Image::open(Parts::alone(file), OpenOptions::new(Access::ReadWrite)).await?;
//!
//! // Write and read. A request owns its buffer and gives it back.
//! let start = GuestOffset(1 << 20);
//! let (result, _buffer) = image.write(start, Buffer::from(&[7; 4096][..]), WriteFlags::FUA).await;
//! result?;
//! let (result, bytes) = image.read(start, Buffer::new(4096)).await;
//! result?;
//! assert_eq!(bytes[0], 7);
//!
//! // Zeroes and discards give space back; a flush makes it all durable.
//! let range = GuestRange::new(start, 65536);
//! image.write_zeroes(range, ZeroFlags::MAY_UNMAP).await?;
//! image.discard(range, DiscardMode::Guest).await?;
//! image.flush().await?;
//!
//! // What is where: zero, hole, depth and host offset are independent facts.
//! let first = image.extents(image.whole()).await?[0];
//! assert!(first.status.reads_zero && first.status.is_hole);
//!
//! // Grow, close, check.
//! image.resize(2 << 30, Shrink::Refuse).await?;
//! image.close().await?;
//! let file = FileStorage::open(&path, &FileOptions::read_only())?;
//! let report = check(&file, &CheckOptions::default(), &mut |_| {}).await?;
//! assert_eq!((report.corruptions, report.leaks), (0, 0));
//! # Ok::<_, lacuna::Error>(())
//! # }).unwrap();
//! ```
//!
//! Your own files, memory or network: implement [`storage::Storage`]. Your own event loop: open
//! the file with [`storage::DriverChoice::External`], poll its `event_fd` and call `complete`.

pub mod block;
pub mod blocking;
pub mod buffer;
pub mod chain;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod job;
pub mod qcow2;
pub mod raw;
pub mod storage;
pub mod units;

pub use error::{Error, ErrorKind, Result};

/// The example of the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
