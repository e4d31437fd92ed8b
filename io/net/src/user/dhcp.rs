//! The DHCP server of the guest's network (RFC 2131): addresses from 10.0.2.15 on, by MAC address.

use std::net::{Ipv4Addr, SocketAddrV4};

use doppel_device::{NANOS_PER_SECOND, Nanos};
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, IpProtocol,
};

use crate::user::network::{DNS, GATEWAY, GUEST, MASK, Network};
use crate::user::wire;

/// The server's port, and the client's.
pub const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const LEASE_SECONDS: u32 = 24 * 60 * 60;
const LEASES: usize = 16;
const INTERFACE_MTU: u8 = 26;
/// Who has an address that somebody found in use.
const NOBODY: EthernetAddress = EthernetAddress::BROADCAST;

/// Who has which address.
#[derive(Default)]
pub struct Dhcp {
    // Who has the nth address, and until when.
    leases: [Option<(EthernetAddress, Nanos)>; LEASES],
}

impl Dhcp {
    /// The client's address. A new one has the address that it wants, if that is free: it may have had it from a server that was here before.
    fn lease(&mut self, client: EthernetAddress, wanted: Ipv4Addr, now: Nanos) -> Option<Ipv4Addr> {
        let of_client = |lease: &Option<_>| lease.is_some_and(|(mac, _)| mac == client);
        let known = self.leases.iter().position(of_client);
        let free = |n: &usize| {
            let lease = self.leases.get(*n);
            lease.is_some_and(|lease| lease.is_none_or(|(_, until)| until <= now))
        };
        let n = known
            .or_else(|| Some(place(wanted)).filter(free))
            .or_else(|| (0..LEASES).find(free))?;
        self.leases[n] = Some((client, now + u64::from(LEASE_SECONDS) * NANOS_PER_SECOND));
        Some(Ipv4Addr::from(u32::from(GUEST) + n as u32))
    }

    /// The client has the address no more; somebody else may have it already where it is `in_use`.
    fn give_back(&mut self, client: EthernetAddress, address: Ipv4Addr, in_use: bool) {
        if let Some(lease) = self.leases.get_mut(place(address))
            && let Some((mac, until)) = *lease
            && mac == client
        {
            *lease = in_use.then_some((NOBODY, until));
        }
    }

    /// A message from a client.
    pub fn message(&mut self, network: &mut Network, data: &[u8]) {
        let Ok(packet) = DhcpPacket::new_checked(data) else {
            return;
        };
        let Ok(request) = DhcpRepr::parse(&packet) else {
            return;
        };
        let Some((kind, address)) = self.decide(&request, network.now) else {
            return;
        };
        let mtu = (network.mtu as u16).to_be_bytes();
        let options = [DhcpOption {
            kind: INTERFACE_MTU,
            data: &mtu,
        }];
        let reply = reply(&request, kind, address, &options);
        let mut bytes = vec![0; reply.buffer_len()];
        if reply
            .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
            .is_err()
        {
            return;
        }
        answer(network, &request, kind, &bytes);
    }

    /// What to answer, and the address that it is about.
    fn decide(&mut self, request: &DhcpRepr, now: Nanos) -> Option<(DhcpMessageType, Ipv4Addr)> {
        let client = request.client_hardware_address;
        let wanted = request.requested_ip.unwrap_or(request.client_ip);
        let ours = request
            .server_identifier
            .is_none_or(|server| server == GATEWAY);
        let answer = match request.message_type {
            DhcpMessageType::Discover => (DhcpMessageType::Offer, self.lease(client, wanted, now)?),
            DhcpMessageType::Request if ours => match self.lease(client, wanted, now)? {
                address if address == wanted => (DhcpMessageType::Ack, address),
                _ => (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
            },
            DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
            DhcpMessageType::Release => {
                self.give_back(client, request.client_ip, false);
                return None;
            }
            DhcpMessageType::Decline => {
                self.give_back(client, wanted, true);
                return None;
            }
            _ => return None,
        };
        Some(answer)
    }
}

/// The place of an address among the leases; beyond them where it is none of ours.
fn place(address: Ipv4Addr) -> usize {
    u32::from(address).wrapping_sub(u32::from(GUEST)) as usize
}

fn reply<'a>(
    request: &DhcpRepr,
    kind: DhcpMessageType,
    address: Ipv4Addr,
    options: &'a [DhcpOption<'a>],
) -> DhcpRepr<'a> {
    let tells = kind != DhcpMessageType::Nak;
    let lease = (tells && !address.is_unspecified()).then_some(LEASE_SECONDS);
    DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: request.client_ip,
        your_ip: address,
        server_ip: GATEWAY,
        router: tells.then_some(GATEWAY),
        subnet_mask: tells.then_some(MASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: tells.then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: lease,
        renew_duration: None,
        rebind_duration: None,
        additional_options: if tells { options } else { &[] },
    }
}

/// To the client's address where it has one, else to everybody (the client may not take frames for its address yet).
fn answer(network: &mut Network, request: &DhcpRepr, kind: DhcpMessageType, bytes: &[u8]) {
    let configured = !request.client_ip.is_unspecified() && kind != DhcpMessageType::Nak;
    let to = if configured {
        request.client_ip
    } else {
        Ipv4Addr::BROADCAST
    };
    let mut route = network.route(GATEWAY, to);
    route.to = match configured {
        true => request.client_hardware_address,
        false => EthernetAddress::BROADCAST,
    };
    let from = SocketAddrV4::new(GATEWAY, SERVER_PORT);
    let (offload, datagram) = wire::datagram(&route, from.port(), CLIENT_PORT, bytes, false);
    network.post_packet(&route, IpProtocol::Udp, offload, &datagram);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_last_and_a_new_server_leaves_clients_theirs() {
        let address = |n| Ipv4Addr::new(10, 0, 2, n);
        let client = |n| EthernetAddress([2, 0, 0, 0, 0, n]);
        let mut dhcp = Dhcp::default();
        let nothing = Ipv4Addr::UNSPECIFIED;
        assert_eq!(dhcp.lease(client(1), nothing, 0), Some(address(15)));
        assert_eq!(dhcp.lease(client(2), nothing, 0), Some(address(16)));
        assert_eq!(dhcp.lease(client(1), address(17), 0), Some(address(15)));
        assert_eq!(dhcp.lease(client(3), address(15), 0), Some(address(17)));
        // The second client comes to a new one first.
        let mut dhcp = Dhcp::default();
        assert_eq!(dhcp.lease(client(2), address(16), 0), Some(address(16)));
        assert_eq!(dhcp.lease(client(1), address(15), 0), Some(address(15)));
        for outside in [address(14), address(31), Ipv4Addr::BROADCAST] {
            assert_eq!(dhcp.lease(client(4), outside, 0), Some(address(17)));
        }
        for n in 5..=17 {
            assert!(dhcp.lease(client(n), nothing, 0).is_some());
        }
        assert_eq!(dhcp.lease(client(18), nothing, 0), None, "all are taken");
    }

    fn request(kind: DhcpMessageType, n: u8, wanted: u8) -> DhcpRepr<'static> {
        let nothing = Ipv4Addr::UNSPECIFIED;
        DhcpRepr {
            message_type: kind,
            transaction_id: 7,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, n]),
            client_ip: nothing,
            your_ip: nothing,
            server_ip: nothing,
            router: None,
            subnet_mask: None,
            relay_agent_ip: nothing,
            broadcast: false,
            requested_ip: (wanted != 0).then_some(Ipv4Addr::new(10, 0, 2, wanted)),
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        }
    }

    fn leases(dhcp: &Dhcp) -> usize {
        dhcp.leases.iter().flatten().count()
    }

    #[test]
    fn an_address_that_is_given_back_is_free_and_one_that_is_declined_is_not_offered_again() {
        use DhcpMessageType::{Ack, Decline, Discover, Offer, Release, Request};
        let address = |n| Ipv4Addr::new(10, 0, 2, n);
        let mut dhcp = Dhcp::default();
        // More than there are addresses, one after another.
        for n in 0..40 {
            let offer = dhcp.decide(&request(Discover, n, 0), 0);
            assert_eq!(offer, Some((Offer, address(15))), "{n}");
            let ack = dhcp.decide(&request(Request, n, 15), 0);
            assert_eq!(ack, Some((Ack, address(15))), "{n}");
            let mut release = request(Release, n, 0);
            release.client_ip = address(15);
            assert_eq!(dhcp.decide(&release, 0), None);
        }
        assert_eq!(leases(&dhcp), 0);
        assert_eq!(
            dhcp.decide(&request(Discover, 1, 0), 0),
            Some((Offer, address(15)))
        );
        assert_eq!(dhcp.decide(&request(Decline, 1, 15), 0), None);
        assert_eq!(
            dhcp.decide(&request(Discover, 1, 15), 0),
            Some((Offer, address(16)))
        );
    }

    #[test]
    fn who_only_asks_or_takes_another_servers_offer_has_no_address() {
        use DhcpMessageType::{Ack, Inform, Release, Request};
        let mut dhcp = Dhcp::default();
        let mut inform = request(Inform, 1, 0);
        inform.client_ip = Ipv4Addr::new(10, 0, 2, 77);
        let nothing = Ipv4Addr::UNSPECIFIED;
        assert_eq!(dhcp.decide(&inform, 0), Some((Ack, nothing)));
        let mut elsewhere = request(Request, 2, 15);
        elsewhere.server_identifier = Some(Ipv4Addr::new(10, 0, 2, 99));
        assert_eq!(dhcp.decide(&elsewhere, 0), None);
        assert_eq!(dhcp.decide(&request(Release, 3, 0), 0), None);
        assert_eq!(leases(&dhcp), 0);
    }

    #[test]
    fn a_lease_that_nobody_renewed_is_anothers() {
        use DhcpMessageType::{Ack, Discover, Offer, Request};
        let address = |n| Ipv4Addr::new(10, 0, 2, n);
        let day = u64::from(LEASE_SECONDS) * NANOS_PER_SECOND;
        let mut dhcp = Dhcp::default();
        for n in 0..LEASES as u8 {
            assert!(dhcp.decide(&request(Discover, n, 0), 0).is_some());
        }
        let renewal = dhcp.decide(&request(Request, 0, 15), day / 2);
        assert_eq!(renewal, Some((Ack, address(15))));
        assert_eq!(dhcp.decide(&request(Discover, 99, 0), day - 1), None);
        let offer = dhcp.decide(&request(Discover, 99, 0), day);
        assert_eq!(offer, Some((Offer, address(16))));
    }
}
