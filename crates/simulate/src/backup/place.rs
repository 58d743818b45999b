//! A folder whose power can go: files of a simulated host, with names that are durable once the folder
//! is flushed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lacuna::buffer::Hold;
use lacuna::chain::{Identity, Opener};
use lacuna::qcow2::Access;
use lacuna::storage::{Claim, Storage};
use lacuna::{Error, ErrorKind, Result};
use lacuna_backup::{OpenAs, Place};
use pollster::block_on;
use testkit::sim::crash::{Crash, Remnant};
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{Random, SparseBytes};

/// A change of names.
#[derive(Clone, Debug)]
enum NameChange {
    Put {
        name: String,
        file: usize,
    },
    Rename {
        from: String,
        to: String,
    },
    Remove {
        name: String,
    },
    /// All before is durable.
    Flushed,
}

/// Which file a name leads to.
type Names = BTreeMap<String, usize>;

/// A folder of one host; paths say more than the name of a file, which counts alone.
#[derive(Clone, Debug)]
pub(super) struct SimFolder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    host: SimHost,
    names: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was durable at the start.
    initial: Names,
    now: Names,
    /// What happened since; the host's record has a note of each, by its number.
    changes: Vec<NameChange>,
}

impl SimFolder {
    /// Makes a folder of files that are durable.
    pub(super) fn new(files: Vec<(String, SparseBytes)>, seed: u64) -> Self {
        let host = SimHost::new(Pace::AtOnce, seed);
        let mut names = Names::new();
        for (index, (name, content)) in files.into_iter().enumerate() {
            host.add_file(content);
            names.insert(name, index);
        }
        let state = State { initial: names.clone(), now: names, changes: Vec::new() };
        Self(Arc::new(Shared { host, names: Mutex::new(state) }))
    }

    pub(super) fn host(&self) -> &SimHost {
        &self.0.host
    }

    /// Returns the files there are now.
    pub(super) fn files(&self) -> Vec<(String, SparseBytes)> {
        let names = self.state().now.clone();
        names.into_iter().map(|(name, file)| (name, self.0.host.content(file))).collect()
    }

    /// Returns what may be left of the folder, where that is left of its files: of the names that were
    /// not flushed some changed.
    pub(super) fn left(
        &self,
        crash: &Crash,
        remnant: &Remnant,
        random: &mut Random,
    ) -> Vec<(String, SparseBytes)> {
        let names = self.state();
        let before = crash.mark.map_or(0, |mark| mark as usize + 1);
        let changes = &names.changes[..before];
        let is_flush = |change: &NameChange| matches!(change, NameChange::Flushed);
        let durable = changes.iter().rposition(is_flush).map_or(0, |at| at + 1);
        let mut left = names.initial.clone();
        changes[..durable].iter().for_each(|change| change.apply(&mut left));
        let odds = *random.pick(&[0, 1, 1, 2]);
        for change in &changes[durable..] {
            // None, half of them, all.
            if random.below(2) < odds {
                change.apply(&mut left);
            }
        }
        let files = crash.files_left(remnant);
        let content = |file: usize| files.get(file).cloned().unwrap_or_default();
        left.into_iter().map(|(name, file)| (name, content(file))).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: NameChange) {
        let mut state = self.state();
        change.apply(&mut state.now);
        let number = state.changes.len() as u64;
        state.changes.push(change);
        self.0.host.mark(number);
    }

    fn find(&self, path: &Path) -> Option<usize> {
        self.state().now.get(&name(path)).copied()
    }

    fn needed(&self, path: &Path) -> Result<SimStorage> {
        let missing =
            || Error::new(ErrorKind::NotFound, format!("{} is not there", path.display()));
        Ok(self.0.host.open_file(self.find(path).ok_or_else(missing)?))
    }

    /// Opens an empty file.
    fn emptied(&self, path: &Path) -> Result<SimStorage> {
        let Some(file) = self.find(path) else {
            let storage = self.0.host.add_file(SparseBytes::default());
            let file = storage.index();
            self.change(NameChange::Put { name: name(path), file });
            return Ok(storage);
        };
        let storage = self.0.host.open_file(file);
        block_on(storage.set_len(0, Hold::none()))?;
        Ok(storage)
    }
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Put { name, file } => drop(names.insert(name.clone(), *file)),
            Self::Rename { from, to } => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Remove { name } => drop(names.remove(name)),
            Self::Flushed => {}
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Place for SimFolder {
    type Storage = SimStorage;
    type Opener = Self;
    type Lock = ();

    fn make_folder(&self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn names(&self, _: &Path) -> Result<Vec<String>> {
        Ok(self.state().now.keys().cloned().collect())
    }

    fn has(&self, path: &Path) -> bool {
        self.find(path).is_some()
    }

    fn read(&self, path: &Path, most_bytes: u64) -> Result<Vec<u8>> {
        self.needed(path)?;
        let file = self.find(path).unwrap_or_default();
        let content = self.0.host.content(file);
        match content.len() <= most_bytes {
            true => Ok(content.to_vec()),
            false => Err(Error::corrupt("It is too long")),
        }
    }

    fn open(&self, path: &Path, how: OpenAs) -> Result<SimStorage> {
        match how {
            OpenAs::New | OpenAs::NewImage => self.emptied(path),
            OpenAs::Changing | OpenAs::Unchanging => self.needed(path),
        }
    }

    fn opener(&self) -> Self {
        self.clone()
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.needed(from)?;
        self.change(NameChange::Rename { from: name(from), to: name(to) });
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        if self.has(path) {
            self.change(NameChange::Remove { name: name(path) });
        }
        Ok(())
    }

    fn sync_folder(&self, _: &Path) -> Result<()> {
        self.change(NameChange::Flushed);
        Ok(())
    }

    fn lock(&self, _: &Path) -> Result<Option<()>> {
        Ok(Some(()))
    }
}

impl Opener for SimFolder {
    type Storage = SimStorage;

    async fn open(&self, path: &Path, _: Access) -> Result<SimStorage> {
        self.needed(path)
    }

    async fn claim(&self, _: &SimStorage, _: Claim) -> Result<()> {
        Ok(())
    }

    async fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::Path(PathBuf::from(name(path))))
    }
}
