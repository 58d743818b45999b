//! What a disk says of its parts reaches clients.

use std::sync::Arc;

use lacuna::Result;
use lacuna::block::{DiscardMode, Extent, KnownZeroes, Layer, WriteFlags, ZeroFlags};
use lacuna::buffer::Buffer;
use lacuna::raw::Raw;
use lacuna::storage::{MemoryStorage, Transfer};
use lacuna::units::{GuestOffset, GuestRange};
use lacuna_export::{
    Address, DirtyRun, Export, ExportOptions, Exports, Listener, Plain, ServedDisk, Server,
    ServerOptions,
};
use testkit::foreign::NBDINFO;

/// A disk in memory that turns, or does not.
struct Turning(Plain<Raw<MemoryStorage>>, bool);

impl Layer for Turning {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn zero_unit_bytes(&self) -> u64 {
        self.0.zero_unit_bytes()
    }

    async fn known_zeroes(&self) -> Result<KnownZeroes> {
        self.0.known_zeroes().await
    }

    async fn read(&self, offset: GuestOffset, buffer: Buffer) -> Transfer {
        self.0.read(offset, buffer).await
    }

    async fn write(&self, offset: GuestOffset, buffer: Buffer, flags: WriteFlags) -> Transfer {
        self.0.write(offset, buffer, flags).await
    }

    async fn write_zeroes(&self, range: GuestRange, flags: ZeroFlags) -> Result<()> {
        self.0.write_zeroes(range, flags).await
    }

    async fn discard(&self, range: GuestRange, mode: DiscardMode) -> Result<()> {
        self.0.discard(range, mode).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    async fn extents(&self, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.extents(range).await
    }
}

impl ServedDisk for Turning {
    fn bitmaps(&self) -> Vec<String> {
        self.0.bitmaps()
    }

    async fn dirty(&self, bitmap: &str, range: GuestRange) -> Result<Vec<DirtyRun>> {
        self.0.dirty(bitmap, range).await
    }

    fn level_sizes(&self) -> Vec<u64> {
        self.0.level_sizes()
    }

    async fn level_extents(&self, level: usize, range: GuestRange) -> Result<Vec<Extent>> {
        self.0.level_extents(level, range).await
    }

    fn level_bitmaps(&self, level: usize) -> Vec<String> {
        self.0.level_bitmaps(level)
    }

    async fn level_dirty(&self, _: usize, name: &str, range: GuestRange) -> Result<Vec<DirtyRun>> {
        self.0.dirty(name, range).await
    }

    async fn resize(&self, size_bytes: u64) -> Result<()> {
        self.0.resize(size_bytes).await
    }

    fn is_rotational(&self) -> bool {
        self.1
    }
}

#[test]
fn each_export_says_of_itself_whether_it_turns() {
    let exports = Arc::new(Exports::default());
    for (name, turns) in [("disk", true), ("flash", false)] {
        let raw = pollster::block_on(Raw::create(MemoryStorage::new(), 1 << 20)).unwrap();
        let disk = Turning(Plain(raw), turns);
        exports.add(Export::new(name, disk, ExportOptions::default()).unwrap()).unwrap();
    }
    let server = Server::start(exports, ServerOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    for listener in Listener::bind(&Address::Unix(socket.clone())).unwrap() {
        server.listen(listener);
    }
    for (name, turns) in [("disk", true), ("flash", false)] {
        let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
        let told = NBDINFO.succeed([&*uri]);
        assert!(told.contains(&format!("is_rotational: {turns}")), "{name}: {told}");
    }
    server.stop();
}
