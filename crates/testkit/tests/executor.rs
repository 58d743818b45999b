//! The executor keeps its promises, and its explorations reach what they claim to reach.

use std::cell::RefCell;
use std::future::{pending, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use lacuna::buffer::{Buffer, Hold, Release};
use lacuna::storage::Storage;
use lacuna::units::HostOffset;
use testkit::sim::{Pace, SimHost};
use testkit::{DropPoint, Executor};

/// Waits until polled twice.
async fn pause() {
    let mut polled = false;
    poll_fn(|context| {
        context.waker().wake_by_ref();
        if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

fn order_of_six(seed: u64) -> Vec<usize> {
    let order = Rc::new(RefCell::new(Vec::new()));
    let mut executor = Executor::new(seed);
    for task in 0..6 {
        let order = Rc::clone(&order);
        executor.spawn(async move {
            pause().await;
            order.borrow_mut().push(task);
        });
    }
    executor.run().unwrap();
    order.take()
}

#[test]
fn same_seed_gives_same_order_and_other_seeds_give_others() {
    assert_eq!(order_of_six(1), order_of_six(1));
    assert!((2..20).any(|seed| order_of_six(seed) != order_of_six(1)));
}

#[test]
fn task_nobody_can_wake_is_reported() {
    let mut executor = Executor::new(1);
    executor.spawn(async {});
    executor.spawn(pending::<()>());
    assert_eq!(executor.run().unwrap_err().waiting, [1]);
}

#[test]
fn drop_points_end_a_future_where_they_say() {
    for (drop_point, expected) in [
        (DropPoint::InsteadOfPoll(1), 0),
        (DropPoint::AfterPoll(1), 1),
        (DropPoint::InsteadOfPoll(2), 1),
        (DropPoint::AfterPoll(2), 2),
        (DropPoint::Never, 3),
    ] {
        let reached = Rc::new(RefCell::new(0));
        let mut executor = Executor::new(3);
        let steps = Rc::clone(&reached);
        let task = executor.spawn_until(drop_point, async move {
            for _ in 0..2 {
                *steps.borrow_mut() += 1;
                pause().await;
            }
            *steps.borrow_mut() += 1;
        });
        executor.run().unwrap();
        assert_eq!(*reached.borrow(), expected, "{drop_point:?}");
        assert_eq!(task.take().is_some(), drop_point == DropPoint::Never);
    }
}

struct Count(std::sync::atomic::AtomicU64);

impl Release for Count {
    fn release(&self, token: u64) {
        self.0.fetch_add(token, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn dropped_write_keeps_its_hold_until_it_took_effect() {
    let host = SimHost::new(Pace::Executor, 1);
    let file = host.add_file(b"old"[..].into());
    let released = Arc::new(Count(0.into()));
    let mut executor = Executor::new(1);
    let mut buffer = Buffer::from(&b"new"[..]);
    buffer.set_hold(Hold::new(released.clone(), 1));
    let write = file.write_at(HostOffset(0), buffer);
    executor.spawn_until(DropPoint::AfterPoll(1), write);
    executor.run().unwrap();
    assert_eq!(released.0.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(host.content(0).to_vec(), b"old");

    executor.attach(Arc::new(host.clone()));
    executor.settle().unwrap();
    assert_eq!(released.0.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert_eq!(host.content(0).to_vec(), b"new");
}

#[test]
fn calls_in_flight_complete_in_any_order() {
    let winner = |seed| {
        let host = SimHost::new(Pace::Executor, seed);
        let file = host.add_file(b"...."[..].into());
        let mut executor = Executor::new(seed);
        executor.attach(Arc::new(host.clone()));
        for letter in [b'a', b'b', b'c'] {
            let file = file.clone();
            executor.spawn(async move {
                file.write_at(HostOffset(0), Buffer::from(&[letter][..])).await.0.unwrap();
            });
        }
        executor.run().unwrap();
        host.content(0).read_vec(0, 1)[0]
    };
    let winners: std::collections::BTreeSet<u8> = (0..50).map(winner).collect();
    assert_eq!(winners.len(), 3);
}
