//! Brings what overlays hold into the image that they stand on.
//!
//! * Always driven by extents: what no overlay decides is neither read nor written; zeros become zeros
//!   by request, and only where the base is not known to read so.
//! * The overlays are changed last: until all is durable in the base they hold what they held, and read
//!   the same. A commit that was cut short can be run again.
//! * Emptying gives up what the base reads the same by then, in any order.
//! * Memory: that of a conversion.

use super::convert::{ConvertOptions, Copied, Progress, TargetContent, convert};
use crate::block::Layer;
use crate::chain::SplitChain;
use crate::storage::Storage;
use crate::{Error, Result};

/// Writes into the base of `chain` what the images above it decide, makes that durable and closes the
/// base. The top stays open, and holds what it held; [`empty_top`] is for that.
///
/// A base that is shorter than the top becomes as long; one that is longer stays so. Images between
/// the two must not be used on their own any more. `progress` is told of the copy. Dropped or failed
/// at any point, the top reads what it read, and the base is to be closed.
///
/// # Errors
/// What reading, growing, writing, flushing and closing give.
///
/// ```
/// use std::path::Path;
/// use std::sync::Arc;
/// use lacuna::block::{Layer, WriteFlags};
/// use lacuna::buffer::Buffer;
/// use lacuna::chain::{self, Allow, ChainOptions, Format, MemoryOpener};
/// use lacuna::job;
/// use lacuna::qcow2::{Access, BackingName, CreateOptions, create};
/// use lacuna::storage::MemoryStorage;
/// use lacuna::units::GuestOffset;
///
/// pollster::block_on(async {
///     let (top, base) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
///     let backing = Some(BackingName { name: "base".into(), format: Some("raw".into()) });
///     create(&top, &CreateOptions { size_bytes: 1 << 20, backing, ..Default::default() }).await?;
///     let opener = MemoryOpener::default().with("top", top).with("base", Arc::clone(&base));
///     let options = ChainOptions {
///         backing: Allow::Named,
///         ..ChainOptions::new(Format::Qcow2, Access::ReadWrite)
///     };
///     let chain = chain::open_split(&opener, Path::new("top"), &options, 1).await?;
///     let bytes = Buffer::from(&[7; 512][..]);
///     chain.above.disk().write(GuestOffset(0), bytes, WriteFlags::empty()).await.0?;
///
///     job::commit(&chain, &mut |_| ()).await?;
///     assert_eq!((base.to_vec().len(), base.to_vec()[0]), (1 << 20, 7));
///     job::empty_top(&chain).await?;
///     chain.above.into_disk().close().await
/// }).unwrap();
/// ```
pub async fn commit<S: Storage>(
    chain: &SplitChain<S>,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Copied> {
    let copied = copy(chain, progress).await;
    let closed = chain.base.disk().clone().close().await;
    copied.and_then(|copied| closed.map(|()| copied))
}

async fn copy<S: Storage>(
    chain: &SplitChain<S>,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Copied> {
    let (top, base) = (chain.above.disk(), chain.base.disk());
    if base.size_bytes() < top.size_bytes() {
        base.grow(top.size_bytes()).await?;
    }
    let options = ConvertOptions {
        content: TargetContent::Beneath { shown_bytes: chain.shown_bytes() },
        // Zeros are found where the base can keep them as such, in no smaller parts.
        sparse_bytes: base.zero_unit_bytes(),
        ..ConvertOptions::default()
    };
    convert(top, base, &options, progress).await
}

/// Empties the top of a chain whose base has its content by now: see
/// [`Image::make_empty`](crate::qcow2::Image::make_empty). Durable when it returns.
///
/// # Errors
/// `InvalidRequest` where there are images between the top and the base, which would show through;
/// else what emptying gives.
pub async fn empty_top<S: Storage>(chain: &SplitChain<S>) -> Result<()> {
    match chain.above.disk().as_qcow2() {
        Some(image) if chain.above.levels().len() == 1 => image.make_empty().await,
        _ => Err(Error::invalid(
            "The top cannot be emptied over images that are not the base: they would show through",
        )),
    }
}
