//! What every transport must do: one suite, run by each rank of each of them.

use cellrefine::collective::behind::Behind;
use cellrefine::collective::{Collective, slice};
use cellrefine::error::{Code, Error, Kind};

/// Reproducible floats of many magnitudes, others on each rank.
pub fn floats(len: usize, rank: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9u32.wrapping_mul(rank as u32 + 1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    (0..len)
        .map(|_| (next() as f32 / u32::MAX as f32 - 0.5) * 2f32.powi((next() >> 27) as i32 - 16))
        .collect()
}

/// The sum as the contract has it: rank order, f64, rounded once.
fn summed(len: usize, world: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> = (0..world).map(|r| floats(len, r)).collect();
    (0..len).map(|i| all.iter().map(|x| x[i] as f64).sum::<f64>() as f32).collect()
}

/// Runs the suite as one rank.
pub fn conformance(all: &Collective) {
    let (rank, world) = (all.rank(), all.world());
    all.barrier().unwrap();

    // Messages of every length, none included; each comes back under its rank's number.
    for base in [0usize, 1, 1000] {
        let mine = vec![rank as u8; base * rank];
        let messages = all.messages(&mine).unwrap();
        assert_eq!(messages.len(), world);
        for (r, message) in messages.iter().enumerate() {
            assert_eq!(*message, vec![r as u8; base * r]);
        }
    }

    // Sums of a few numbers.
    let mut sums = [rank as f64, 0.1, -1e300 * rank as f64];
    all.sum(&mut sums).unwrap();
    let n = world as f64;
    assert_eq!(sums[0], n * (n - 1.0) / 2.0);
    assert!((sums[1] - 0.1 * n).abs() < 1e-12);
    all.sum(&mut []).unwrap();

    // Sums of floats: odd sizes, fewer elements than ranks, more than a bucket; bits, not tolerances.
    for len in [0, 1, 15, 17, 16 * world + 3, 100_003, 5_000_001] {
        all.at_step(len as u64);
        let wanted = summed(len, world);
        let mut x = floats(len, rank);
        all.all_reduce(&mut x).unwrap();
        assert!(x.iter().zip(&wanted).all(|(a, b)| a.to_bits() == b.to_bits()), "all_reduce of {len}");
        let mut x = floats(len, rank);
        let own = all.reduce_scatter(&mut x).unwrap();
        assert_eq!(own, slice(len, rank, world));
        let before = floats(len, rank);
        for (i, (a, b)) in x.iter().zip(&wanted).enumerate() {
            let wanted = if own.contains(&i) { *b } else { before[i] };
            assert_eq!(a.to_bits(), wanted.to_bits(), "reduce_scatter of {len} at {i}");
        }
    }

    // Pieces, behind other work of each rank: the same bits, for all and for their owners alone.
    let (len, cuts) = (100_003, [77_777, 77_776, 4096, 1001, 16, 0]);
    let (mine, wanted) = (floats(len, rank), summed(len, world));
    let mut behind = Behind::begin(all).unwrap();
    for (i, cut) in cuts.windows(2).enumerate() {
        let range = cut[1]..cut[0];
        let piece =
            if i % 2 == 0 { all.piece(range.clone()) } else { all.scattered_piece(range.clone(), len) };
        let values = mine[range].to_vec();
        std::thread::sleep(std::time::Duration::from_millis(3 * ((rank + i) % world) as u64));
        behind.add(piece, move || Ok(values));
    }
    for (i, (piece, sums)) in behind.take().unwrap().into_iter().enumerate() {
        assert_eq!((piece.range.end, sums.len()), (cuts[i], piece.range.len()));
        for (at, sum) in piece.range.clone().zip(sums) {
            let summed = i % 2 == 0 || slice(len, rank, world).contains(&at);
            let wanted = if summed { wanted[at] } else { mine[at] };
            assert_eq!(sum.to_bits(), wanted.to_bits(), "piece {i} at {at}");
        }
    }

    assert!(behind.take().unwrap().is_empty());
    // What fails on its way fails the rank that asks for it, once the others have theirs.
    behind.add(all.piece(0..3), || Ok(vec![1.0; 3]));
    behind.add(all.piece(0..0), || Err(Error::new(Code::FileMissing, "no floats")));
    assert_eq!(behind.take().unwrap_err().code(), Code::FileMissing);
    behind.add(all.piece(0..0), || Ok(Vec::new()));
    assert_eq!(behind.take().unwrap_err().kind(), Kind::Bug);

    // A NaN of one rank is everybody's.
    let mut x = vec![if rank == world - 1 { f32::NAN } else { 1.0 }; 40];
    all.all_reduce(&mut x).unwrap();
    assert!(x.iter().all(|x| x.is_nan()));

    // Uneven runs, empty ones among them.
    let lens: Vec<usize> = (0..world).map(|r| [7, 0, 130][r % 3]).collect();
    let starts: Vec<usize> = lens.iter().scan(2, |at, len| Some(std::mem::replace(at, *at + len))).collect();
    let ranges: Vec<_> = starts.iter().zip(&lens).map(|(s, l)| *s..s + l).collect();
    let mut x = vec![u16::MAX; 2 + lens.iter().sum::<usize>() + 3];
    x[ranges[rank].clone()].fill(rank as u16);
    all.all_gather_ranges(&mut x, &ranges).unwrap();
    for (r, range) in ranges.iter().enumerate() {
        assert!(x[range.clone()].iter().all(|v| *v == r as u16));
    }
    assert!(x[..2].iter().chain(&x[x.len() - 3..]).all(|v| *v == u16::MAX), "guard words");

    // What the leader makes; its failure.
    let made = all.lead(|| Ok(vec![3, 1, 4])).unwrap();
    assert_eq!(made, [3, 1, 4]);
    assert_eq!(all.lead(|| Ok(Vec::new())).unwrap(), Vec::<u8>::new());
    let failed = all
        .lead(|| Err(cellrefine::error::Error::new(cellrefine::error::Code::FileMissing, "no such file")))
        .unwrap_err();
    assert!(failed.to_string().contains("no such file"), "{failed}");
    all.barrier().unwrap();
}
