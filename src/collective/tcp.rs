//! Ranks that are processes: a socket between every two of them, nothing to install.
//!
//! Rank 0 listens at the job's address; the others introduce themselves there, learn where everyone listens, and connect to all
//! lower ranks. From then on one exchange is one loop over non-blocking sockets: write what fits, read what came, sleep in `poll`
//! until something moves or the time-out passes. So no pair can block another, a closed socket is noticed at once, and the message
//! about a rank that hangs is made by those that wait for it.

use super::threads::{ended, out_of_step, silent, stopped};
use super::wire::{FrameKind, Greeting, HEADER, Header, TEXT};
use super::{Call, Collective, Operation, Transport};
use crate::error::{Code, Error, Result};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Who and where: what [`connect`] needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// `HOST:PORT` where rank 0 listens.
    pub master: String,
    /// Longest wait for a rank, when meeting and in every exchange.
    pub timeout: Duration,
}

/// How long a rank that stops waits for the others to hear why.
const FAREWELL: Duration = Duration::from_millis(500);

struct Peer {
    stream: TcpStream,
    host: String,
    /// A frame to it is on its way: nothing else may be sent before its rest.
    partial: bool,
}

/// Sockets to all other ranks.
pub struct Tcp {
    rank: usize,
    timeout: Duration,
    /// By rank; `None` for this one.
    peers: Mutex<Vec<Option<Peer>>>,
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tcp rank {}", self.rank)
    }
}

/// Meets the other ranks.
///
/// # Errors
/// Environment (4): the address is taken or cannot be reached, ranks that do not come in time. Usage (2): ranks of another job.
pub fn connect(place: &Place) -> Result<Collective> {
    let deadline = Instant::now() + place.timeout;
    let meeting = match place.rank {
        0 => gather(place, deadline)?,
        _ => introduce(place, deadline)?,
    };
    for peer in meeting.iter().flatten() {
        let prepared = peer.stream.set_nodelay(true).and_then(|()| peer.stream.set_nonblocking(true));
        prepared.map_err(|e| {
            Error::new(Code::RankConnection, "cannot set up a connection between ranks").found(e)
        })?;
    }
    let tcp = Tcp { rank: place.rank, timeout: place.timeout, peers: Mutex::new(meeting) };
    let all = Collective::over(tcp);
    all.barrier()?;
    Ok(all)
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "an unnamed host".into() } else { name.trim().into() }
}

fn greeting(place: &Place, port: u16) -> Greeting {
    let version = env!("CARGO_PKG_VERSION").into();
    Greeting { rank: place.rank, world: place.world, host: hostname(), port, version }
}

/// Rank 0: waits for everyone, then tells everyone where everyone is.
fn gather(place: &Place, deadline: Instant) -> Result<Vec<Option<Peer>>> {
    let master = &place.master;
    let address = resolve(master)?;
    let listener = TcpListener::bind(address).map_err(|e| {
        let error = Error::new(Code::RankConnection, "cannot listen for the other ranks")
            .at(master)
            .found(e.to_string());
        error.next("another job or service has the port: choose another with --master HOST:PORT")
    })?;
    let mut peers: Vec<Option<Peer>> = (0..place.world).map(|_| None).collect();
    let mut places: Vec<Option<(IpAddr, u16)>> = vec![None; place.world];
    for _ in 1..place.world {
        let missing = || {
            let missing: Vec<String> =
                (1..place.world).filter(|r| peers[*r].is_none()).map(|r| r.to_string()).collect();
            Error::new(
                Code::RankLate,
                format!("rank {} did not come within {} s", missing.join(", "), place.timeout.as_secs_f64()),
            )
            .at(format!("rank 0, waiting at {master} for {} ranks", place.world))
            .next(
                "start all ranks, with the same --master and --world; a longer wait: --rank-timeout SECONDS",
            )
        };
        let (stream, from, theirs) = accept(&listener, deadline).map_err(|e| e.unwrap_or_else(missing))?;
        theirs.check(place.world)?;
        if theirs.rank == 0 || peers[theirs.rank].is_some() {
            return Err(Error::new(Code::RankNumbers, "two processes say that they are the same rank")
                .at(format!("rank {} on {}", theirs.rank, theirs.host))
                .next("give each process its own --rank, or let the launcher number them"));
        }
        places[theirs.rank] = Some((from.ip(), theirs.port));
        peers[theirs.rank] = Some(Peer { stream, host: theirs.host, partial: false });
    }
    let table = serde_json::to_vec(&places).map_err(|e| Error::bug(e.to_string()))?;
    for peer in peers.iter_mut().flatten() {
        send_frame(&mut peer.stream, FrameKind::Greeting, &table).map_err(|e| met(&peer.host, &e))?;
    }
    Ok(peers)
}

/// The others: meet rank 0, then all ranks below, then those above.
fn introduce(place: &Place, deadline: Instant) -> Result<Vec<Option<Peer>>> {
    let address = resolve(&place.master)?;
    let unreachable = |e: std::io::Error| {
        Error::new(Code::RankConnection, "cannot reach rank 0")
            .at(&place.master)
            .found(e.to_string())
            .next("is rank 0 started, and is --master an address that this machine can reach?")
    };
    let mut zero = call(address, deadline).map_err(unreachable)?;
    let own = zero.local_addr().map_err(unreachable)?;
    let listener = TcpListener::bind((own.ip(), 0)).map_err(unreachable)?;
    let port = listener.local_addr().map_err(unreachable)?.port();
    let mine = serde_json::to_vec(&greeting(place, port)).map_err(|e| Error::bug(e.to_string()))?;
    send_frame(&mut zero, FrameKind::Greeting, &mine).map_err(unreachable)?;
    let table = receive_text(&mut zero, deadline).map_err(unreachable)?;
    let places: Vec<Option<(IpAddr, u16)>> = serde_json::from_slice(&table).map_err(|e| {
        Error::new(Code::RankConnection, "rank 0 does not speak our language").at(&place.master).found(e)
    })?;
    let mut peers: Vec<Option<Peer>> = (0..place.world).map(|_| None).collect();
    peers[0] = Some(Peer { stream: zero, host: place.master.clone(), partial: false });
    for (rank, there) in places.iter().enumerate().take(place.rank) {
        let Some((ip, port)) = there else { continue };
        let mut stream = call(SocketAddr::new(*ip, *port), deadline)
            .map_err(|e| met(&format!("{ip} (rank {rank})"), &e))?;
        send_frame(&mut stream, FrameKind::Greeting, &mine).map_err(|e| met(&ip.to_string(), &e))?;
        peers[rank] = Some(Peer { stream, host: ip.to_string(), partial: false });
    }
    for _ in place.rank + 1..place.world {
        let late =
            || Error::new(Code::RankLate, "higher ranks did not come").at(format!("rank {}", place.rank));
        let (stream, _, theirs) = accept(&listener, deadline).map_err(|e| e.unwrap_or_else(late))?;
        theirs.check(place.world)?;
        peers[theirs.rank] = Some(Peer { stream, host: theirs.host, partial: false });
    }
    Ok(peers)
}

fn met(host: &str, e: &std::io::Error) -> Error {
    Error::new(Code::RankLost, "lost a rank while meeting").at(host).found(e.to_string())
}

fn resolve(master: &str) -> Result<SocketAddr> {
    let wrong = |found: String| {
        Error::new(Code::RankAddress, "the address of rank 0 cannot be used")
            .at(format!("--master {master}"))
            .found(found)
            .wanted("HOST:PORT, reachable from all ranks")
    };
    let mut all = master.to_socket_addrs().map_err(|e| wrong(e.to_string()))?;
    all.next().ok_or_else(|| wrong("no address".into()))
}

/// Connects, again and again until `deadline`: rank 0 may not listen yet.
fn call(address: SocketAddr, deadline: Instant) -> std::io::Result<TcpStream> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() >= deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The next rank that introduces itself; strangers are hung up on. `Err(None)` when time is up.
fn accept(
    listener: &TcpListener,
    deadline: Instant,
) -> std::result::Result<(TcpStream, SocketAddr, Greeting), Option<Error>> {
    let broken = |e: std::io::Error| {
        Some(Error::new(Code::RankConnection, "cannot accept a rank").found(e.to_string()))
    };
    listener.set_nonblocking(true).map_err(broken)?;
    loop {
        match listener.accept() {
            Ok((mut stream, from)) => {
                stream.set_nonblocking(false).map_err(broken)?;
                // A stranger that says nothing must not hold up the others for long.
                let patience = deadline.min(Instant::now() + Duration::from_secs(5));
                let greeting = receive_text(&mut stream, patience).ok();
                if let Some(greeting) = greeting.and_then(|text| serde_json::from_slice(&text).ok()) {
                    return Ok((stream, from, greeting));
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(None);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => return Err(broken(e)),
        }
    }
}

fn send_frame(stream: &mut TcpStream, kind: FrameKind, text: &[u8]) -> std::io::Result<()> {
    let call = Call { operation: Operation::Meet, step: 0, sequence: 0 };
    stream.write_all(&Header { kind, call, length: text.len() as u64 }.to_bytes())?;
    stream.write_all(text)
}

/// A greeting or a table, from a socket that blocks.
fn receive_text(stream: &mut TcpStream, deadline: Instant) -> std::io::Result<Vec<u8>> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let header = Header::parse(&header).filter(|h| h.kind == FrameKind::Greeting && h.length <= TEXT * 16);
    let Some(header) = header else { return Err(ErrorKind::InvalidData.into()) };
    let mut text = vec![0; header.length as usize];
    stream.read_exact(&mut text)?;
    Ok(text)
}

/// One direction of one pair in an exchange.
struct Progress {
    header: [u8; HEADER],
    done: usize,
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.peers.lock().map_or(0, |p| p.len())
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn exchange(&self, call: Call, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let mut peers = self.peers.lock().map_err(|_| Error::bug("a thread of this rank panicked"))?;
        let world = peers.len();
        let deadline = Instant::now() + self.timeout;
        let mut out: Vec<Progress> = (0..world)
            .map(|r| {
                let length = send[r].len() as u64;
                Progress { header: Header { kind: FrameKind::Data, call, length }.to_bytes(), done: 0 }
            })
            .collect();
        let mut inward: Vec<Progress> =
            (0..world).map(|_| Progress { header: [0; HEADER], done: 0 }).collect();
        loop {
            let (mut moved, mut waiting) = (false, Vec::new());
            for rank in (0..world).filter(|r| *r != self.rank) {
                let Some(peer) = peers[rank].as_mut() else { continue };
                let written = write_some(&mut peer.stream, &mut out[rank], send[rank]);
                // What a rank said before it ended is read before its end is reported.
                let read = read_some(peer, rank, &mut inward[rank], receive[rank], call);
                moved |= read?;
                moved |= written.map_err(|_| ended(rank, &peer.host, call))?;
                let reads = inward[rank].done < HEADER + receive[rank].len();
                let writes = out[rank].done < HEADER + send[rank].len();
                peer.partial = writes && out[rank].done > 0;
                if reads || writes {
                    let events =
                        if reads { libc::POLLIN } else { 0 } | if writes { libc::POLLOUT } else { 0 };
                    waiting.push((rank, libc::pollfd { fd: peer.stream.as_raw_fd(), events, revents: 0 }));
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
            if moved {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let who = |(rank, _): &(usize, _)| {
                    let host = peers[*rank].as_ref().map_or("", |p| &p.host);
                    format!("rank {rank} on {host}")
                };
                return Err(silent(&waiting.iter().map(who).collect::<Vec<_>>(), self.timeout, call));
            }
            let mut fds: Vec<libc::pollfd> = waiting.into_iter().map(|(_, fd)| fd).collect();
            let wait = left.as_millis().clamp(1, 1000) as libc::c_int;
            // SAFETY: `fds` is an array of that many valid entries, of sockets that `peers` keeps open.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, wait) };
        }
    }

    fn abort(&self, reason: &Error) {
        // A thread that panicked within an exchange leaves the lock poisoned, and the sockets usable.
        let mut peers = self.peers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let reason = reason.to_string();
        let text = &reason.as_bytes()[..reason.len().min(TEXT as usize)];
        for peer in peers.iter_mut().flatten().filter(|peer| !peer.partial) {
            // The frame fits the socket's buffer, or the other side does not read, which its own time-out ends.
            let _ = peer.stream.set_nonblocking(false);
            let _ = peer.stream.set_write_timeout(Some(Duration::from_secs(1)));
            let _ = send_frame(&mut peer.stream, FrameKind::Abort, text);
        }
        // A socket that is closed on unread bytes is reset, and the reason that was sent goes with it.
        let deadline = Instant::now() + FAREWELL;
        for peer in peers.iter_mut().flatten() {
            let _ = peer.stream.shutdown(Shutdown::Write);
            let _ = peer.stream.set_nonblocking(false);
            let mut unread = [0; 4096];
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                // A time-out of zero would be none, which is refused.
                let waits = peer.stream.set_read_timeout(Some(left)).is_ok();
                if !waits || !peer.stream.read(&mut unread).is_ok_and(|n| n > 0) {
                    break;
                }
            }
        }
    }
}

/// Writes what the socket takes; did anything move?
fn write_some(stream: &mut TcpStream, progress: &mut Progress, body: &[u8]) -> std::io::Result<bool> {
    let before = progress.done;
    while progress.done < HEADER + body.len() {
        let rest = match progress.done < HEADER {
            true => &progress.header[progress.done..],
            false => &body[progress.done - HEADER..],
        };
        match stream.write(rest) {
            Ok(n) => progress.done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(progress.done > before)
}

/// Reads what came; did anything move?
fn read_some(
    peer: &mut Peer,
    rank: usize,
    progress: &mut Progress,
    body: &mut [u8],
    call: Call,
) -> Result<bool> {
    let before = progress.done;
    while progress.done < HEADER + body.len() {
        let rest = match progress.done < HEADER {
            true => &mut progress.header[progress.done..],
            false => &mut body[progress.done - HEADER..],
        };
        match peer.stream.read(rest) {
            Ok(0) => return Err(ended(rank, &peer.host, call)),
            Ok(n) => progress.done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(ended(rank, &peer.host, call)),
        }
        if progress.done == HEADER {
            check(peer, rank, &progress.header, body.len(), call)?;
        }
    }
    Ok(progress.done > before)
}

/// Is this the header of the exchange that we are in?
fn check(peer: &mut Peer, rank: usize, header: &[u8; HEADER], length: usize, call: Call) -> Result<()> {
    let Some(header) = Header::parse(header) else {
        return Err(Error::new(
            Code::RankConnection,
            "a connection between ranks carries what no rank sends",
        )
        .at(format!("rank {rank} on {}", peer.host)));
    };
    match header.kind {
        FrameKind::Data if header.call == call && header.length == length as u64 => Ok(()),
        FrameKind::Data => Err(out_of_step(rank, header.call, call)),
        FrameKind::Greeting => Err(Error::bug("a rank greets twice").at(format!("rank {rank}"))),
        FrameKind::Abort => {
            let mut reason = vec![0; header.length.min(TEXT) as usize];
            let _ = peer.stream.set_nonblocking(false);
            let _ = peer.stream.set_read_timeout(Some(Duration::from_secs(2)));
            let _ = peer.stream.read_exact(&mut reason);
            Err(stopped(rank, &peer.host, &String::from_utf8_lossy(&reason), call))
        }
    }
}
