//! Copies dirty bitmaps from one image to another.

use crate::qcow2::{BitmapFacts, Image, NewBitmap};
use crate::storage::Storage;
use crate::{Error, Result};

/// Gives `target` the bitmaps of `source`, with what they name: those in `chosen`, in their order.
/// Durable on return, each by itself.
///
/// An enabled one is enabled in the target too, from before it says what it names. The disks must be of
/// one size.
///
/// # Errors
/// As [`Image::add_bitmap`] and [`Image::merge_bitmap`]; bitmaps before the failing one are there, and
/// that one may be there and name too little: whoever made the target throws it away.
///
/// ```
/// use lacuna::job::copy_bitmaps;
/// use lacuna::qcow2::{Access, CreateOptions, Image, NewBitmap, OpenOptions, Parts, create};
/// use lacuna::storage::MemoryStorage;
///
/// pollster::block_on(async {
///     let mut images = Vec::new();
///     for _ in 0..2 {
///         let storage = MemoryStorage::new();
///         create(&storage, &CreateOptions { size_bytes: 1 << 20, ..Default::default() }).await?;
///         let options = OpenOptions::new(Access::ReadWrite);
///         images.push(Image::open(Parts::alone(storage), options).await?);
///     }
///     images[0].add_bitmap(&NewBitmap::new("since-monday")).await?;
///     copy_bitmaps(&images[0], &images[1], &images[0].bitmaps().await?).await?;
///     assert_eq!(images[1].bitmaps().await?.len(), 1);
///     Ok::<_, lacuna::Error>(())
/// }).unwrap();
/// ```
pub async fn copy_bitmaps<S: Storage, T: Storage>(
    source: &Image<S>,
    target: &Image<T>,
    chosen: &[BitmapFacts],
) -> Result<()> {
    for facts in chosen {
        let name = &facts.name;
        let from = source.bitmap(name).await?;
        let granularity_bytes = Some(facts.granularity_bytes);
        let new = NewBitmap { granularity_bytes, is_enabled: facts.is_enabled, name: name.clone() };
        let during = |what: &'static str| {
            move |error: Error| error.context(format!("Failed to {what} bitmap {name}"))
        };
        target.add_bitmap(&new).await.map_err(during("create"))?;
        target.merge_bitmap(name, &from).await.map_err(during("populate"))?;
    }
    Ok(())
}
