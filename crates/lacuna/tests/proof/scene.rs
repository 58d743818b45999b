//! An image that is filled, and open on a seeded executor: for what happens at once, or is dropped.

use std::sync::Arc;

use lacuna::qcow2::Image;
use testkit::sim::{Pace, SimHost, SimStorage};
use testkit::{DropPoint, Executor, ModelDisk};

use crate::case::Case;
use crate::drive::{assert_qemu_agrees, assert_safe, whole_content};

pub(crate) struct Scene {
    pub(crate) host: SimHost,
    pub(crate) executor: Executor<'static>,
    pub(crate) image: Image<SimStorage>,
    pub(crate) model: ModelDisk,
}

impl Scene {
    /// `fill` writes to the image, whose cluster size it is told, and to the model.
    pub(crate) fn set<F>(case: &Case, seed: u64, fill: F) -> Self
    where
        F: AsyncFnOnce(&Image<SimStorage>, &mut ModelDisk, u64) + 'static,
    {
        let host = SimHost::without_record(Pace::Executor, seed);
        let mut executor = Executor::new(seed);
        executor.attach(Arc::new(host.clone()));
        let files = case.on(&host);
        let mut model = case.model();
        let image = executor.block_on(async move { files.open().await }).unwrap();
        let (filled, cluster) = (image.clone(), case.kind.cluster_bytes());
        let fill = async move {
            fill(&filled, &mut model, cluster).await;
            model
        };
        let model = executor.block_on(fill);
        Self { host, executor, image, model }
    }

    /// Drops what `run` starts at sampled awaits, `every` polls apart, each time with an image that
    /// `fill` has filled, until it is over; it takes `least` polls. Nothing may have changed.
    pub(crate) fn drop_everywhere<Fill, Run, F>(
        case: &Case,
        (every, least): (usize, usize),
        fill: Fill,
        run: Run,
    ) where
        Fill: AsyncFnOnce(&Image<SimStorage>, &mut ModelDisk, u64) + Copy + 'static,
        Run: Fn(Image<SimStorage>) -> F,
        F: Future<Output: 'static> + 'static,
    {
        for polls in (1..).step_by(every) {
            let mut scene = Self::set(case, 1, fill);
            let work = run(scene.image.clone());
            let task = scene.executor.spawn_until(DropPoint::AfterPoll(polls), work);
            scene.executor.settle().unwrap();
            let is_over = task.take().is_some();
            scene.judge(case, &format!("{:?} dropped after poll {polls}", case.kind));
            if is_over {
                assert!(polls > least, "{:?}: over after {polls} polls", case.kind);
                return;
            }
        }
    }

    /// Every byte is as it should be, also after a close, and for QEMU.
    pub(crate) fn judge(mut self, case: &Case, story: &str) {
        let (image, model) = (self.image.clone(), self.model.clone());
        let seen = self.executor.block_on(async move { whole_content(&image).await }).unwrap();
        let same = seen.to_vec() == model.content().to_vec();
        assert!(same, "{story}: the content has changed");
        self.executor.block_on(self.image.clone().close()).unwrap();
        let after = case.with_content(self.files(case));
        pollster::block_on(assert_safe(&after, false)).unwrap();
        assert_qemu_agrees(&after, &self.model, story);
    }

    fn files(&self, case: &Case) -> Vec<testkit::SparseBytes> {
        let data = case.data.as_ref().map(|_| self.host.content(1));
        std::iter::once(self.host.content(0)).chain(data).collect()
    }
}
