//! One conformance suite over every transport, and what ranks say when another one dies, hangs, fails or goes astray.

#[path = "common/conformance.rs"]
mod conformance;

use cellrefine::collective::tcp::{self, Place};
use cellrefine::collective::{Collective, threads};
use cellrefine::error::{Code, Error, Kind};
use std::net::TcpListener;
use std::time::{Duration, Instant};

/// Long enough on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);
/// For ranks that never come.
const SHORT: Duration = Duration::from_millis(300);

/// An address of this machine that nobody listens at.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Runs `rank_main` as every rank over sockets.
fn over_tcp<T: Send>(world: usize, timeout: Duration, rank_main: impl Fn(Collective) -> T + Sync) -> Vec<T> {
    let master = free_address();
    std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let place = Place { rank, world, master: master.clone(), timeout };
                scope.spawn(move || rank_main(tcp::connect(&place).unwrap()))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn over_threads<T: Send>(
    world: usize,
    timeout: Duration,
    rank_main: impl Fn(Collective) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let ranks: Vec<_> = threads::ranks(world, timeout)
            .into_iter()
            .map(|all| scope.spawn(move || rank_main(all)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn one_process_alone_conforms() {
    conformance::conformance(&Collective::default());
}

#[test]
fn threads_conform() {
    for world in [2, 3, 4] {
        over_threads(world, PATIENT, |all| conformance::conformance(&all));
    }
}

#[test]
fn sockets_conform() {
    for world in [2, 4] {
        over_tcp(world, PATIENT, |all| conformance::conformance(&all));
    }
}

/// The error that rank 0 meets in a sum at step 7 while rank 1 does `other`.
fn rank_0_meets(over_sockets: bool, timeout: Duration, other: impl Fn(Collective) + Sync) -> Error {
    let body = |all: Collective| {
        if all.rank() == 1 {
            other(all);
            return None;
        }
        all.at_step(7);
        all.sum(&mut [1.0]).err()
    };
    let outcomes = match over_sockets {
        true => over_tcp(2, timeout, body),
        false => over_threads(2, timeout, body),
    };
    outcomes.into_iter().next().flatten().expect("rank 0 fails")
}

#[test]
fn a_rank_that_ends_fails_or_strays_is_named() {
    for sockets in [false, true] {
        let e = rank_0_meets(sockets, PATIENT, drop);
        assert!(e.kind() == Kind::Environment && e.to_string().contains("rank 1 ended"), "{e}");
        assert!(e.to_string().contains("sums of step 7"), "{e}");

        let e = rank_0_meets(sockets, PATIENT, |all| {
            let failed: Result<(), Error> =
                all.guard(|| Err(Error::new(Code::ShardBlock, "shard 3 is damaged").at("x.cells")));
            assert_eq!(failed.unwrap_err().kind(), Kind::Input);
        });
        assert!(e.kind() == Kind::Environment && e.to_string().contains("rank 1 stopped"), "{e}");
        assert!(e.to_string().contains("shard 3 is damaged"), "{e}");

        // At another step, and at another operation.
        let e = rank_0_meets(sockets, PATIENT, |all| {
            all.at_step(8);
            let _ = all.sum(&mut [1.0]);
        });
        assert!(e.to_string().contains("out of step") && e.to_string().contains("step 8"), "{e}");
        let e = rank_0_meets(sockets, PATIENT, |all| {
            all.at_step(7);
            let _ = all.barrier();
        });
        assert!(e.to_string().contains("out of step") && e.to_string().contains("barrier"), "{e}");
    }
}

#[test]
fn a_rank_that_hangs_is_named_after_the_time_out() {
    for sockets in [false, true] {
        let started = Instant::now();
        let e = rank_0_meets(sockets, Duration::from_secs(1), |all| {
            std::thread::sleep(Duration::from_millis(1800));
            drop(all);
        });
        assert!(e.kind() == Kind::Environment && e.to_string().contains("rank 1"), "{e}");
        assert!(e.to_string().contains("did not come within 1 s") && e.to_string().contains("step 7"), "{e}");
        assert!(started.elapsed() >= Duration::from_secs(1));
    }
}

#[test]
fn ranks_that_never_meet_are_told_whom_they_wait_for() {
    let master = free_address();
    let zero = Place { rank: 0, world: 3, master: master.clone(), timeout: SHORT };
    let e = tcp::connect(&zero).unwrap_err();
    assert!(e.kind() == Kind::Environment && e.to_string().contains("rank 1, 2"), "{e}");
    let e = tcp::connect(&Place { rank: 1, ..zero.clone() }).unwrap_err();
    assert!(e.kind() == Kind::Environment && e.to_string().contains("cannot reach rank 0"), "{e}");
    let e = tcp::connect(&Place { master: "nowhere".into(), ..zero.clone() }).unwrap_err();
    assert!(e.kind() == Kind::Usage && e.to_string().contains("HOST:PORT"), "{e}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let e = tcp::connect(&Place { master: taken.local_addr().unwrap().to_string(), ..zero }).unwrap_err();
    assert!(e.kind() == Kind::Environment && e.to_string().contains("cannot listen"), "{e}");
}

#[test]
fn a_stranger_and_a_rank_of_another_job_are_refused() {
    // A stranger that speaks HTTP is hung up on, and the ranks meet all the same.
    let master = free_address();
    let place = |rank, world| Place { rank, world, master: master.clone(), timeout: PATIENT };
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| tcp::connect(&place(0, 2)).map(|all| all.sum(&mut [1.0])));
        let mut stranger = loop {
            if let Ok(stream) = std::net::TcpStream::connect(&master) {
                break stream;
            }
        };
        std::io::Write::write_all(
            &mut stranger,
            b"GET / HTTP/1.1\r\nHost: somewhere.example\r\nUser-Agent: x\r\n\r\n",
        )
        .unwrap();
        let one = scope.spawn(|| tcp::connect(&place(1, 2)).map(|all| all.sum(&mut [1.0])));
        assert!(one.join().unwrap().is_ok() && zero.join().unwrap().is_ok());
    });
    // Another number of ranks: another job at the same address.
    let e = std::thread::scope(|scope| {
        let zero = scope.spawn(|| tcp::connect(&place(0, 2)));
        let other = scope.spawn(|| tcp::connect(&place(1, 3)));
        let e = zero.join().unwrap().unwrap_err();
        assert!(other.join().unwrap().is_err());
        e
    });
    assert!(e.kind() == Kind::Usage && e.to_string().contains("another job"), "{e}");
}
