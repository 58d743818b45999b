//! New images: until they are made there is none.

use lacuna::block::Preallocation;
use lacuna::qcow2::format::{CompressionType, EntryWidth, Version};
use lacuna::qcow2::{BackingName, CreateOptions, DataFileName, create};
use testkit::SparseBytes;
use testkit::case::{Backing, Case, Kind, Store};
use testkit::sim::Pace;

use super::whole::scribble;
use super::{Ran, own_data, told};
use crate::stage::Stage;

pub(super) async fn create_it(kind: &Kind, seed: u64) -> Ran {
    let case = Case { image: SparseBytes::default(), ..kind.build(seed) };
    let mut stage = Stage::of(case, seed, Pace::AtOnce);
    let options = options(&mut stage);
    stage.begin();
    stage.made = usize::MAX;
    create(&stage.host.open_file(0), &options).await.map_err(told("Creating"))?;
    stage.made = stage.moment();
    stage.flushed();
    let image = stage.open().await.map_err(told("Opening"))?;
    scribble(&mut stage, &image, 2).await?;
    stage.close(image).await?;
    Ok(stage)
}

fn options(stage: &mut Stage) -> CreateOptions {
    let kind = *stage.kind();
    let backing = stage.case.backing.as_ref().map(|below| BackingName {
        name: below.name().to_owned(),
        format: Some(below.format.to_owned()),
    });
    let raw = kind.store == Store::RawDataFile;
    let data_file = kind.has_data_file().then(|| DataFileName { name: "data.raw".to_owned(), raw });
    let modes =
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    let can_reserve = own_data(&kind) && kind.backing == Backing::None;
    CreateOptions {
        size_bytes: kind.size_bytes(),
        version: if kind.version == 2 { Version::V2 } else { Version::V3 },
        cluster_bytes: kind.cluster_bytes(),
        entry_width: if kind.extended { EntryWidth::Extended } else { EntryWidth::Standard },
        refcount_bits: 1 << kind.refcount_order,
        compression: match kind.store {
            Store::Zstd => CompressionType::Zstd,
            _ => CompressionType::Deflate,
        },
        lazy_refcounts: kind.lazy,
        backing,
        data_file,
        preallocation: if can_reserve { *stage.random.pick(&modes) } else { Preallocation::Off },
        ..CreateOptions::default()
    }
}
