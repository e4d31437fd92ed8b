//! The DHCP server of the guest's network (RFC 2131): addresses from 10.0.2.15 on, by MAC address.

use std::net::{Ipv4Addr, SocketAddrV4};

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

/// Who has which address.
#[derive(Default)]
pub struct Dhcp {
    // Who has the nth address.
    leases: [Option<EthernetAddress>; LEASES],
}

impl Dhcp {
    /// The client's address. A new one has the address that it wants, if that is free: it may have had it from a server that was here before.
    fn lease(&mut self, client: EthernetAddress, wanted: Ipv4Addr) -> Option<Ipv4Addr> {
        let known = self.leases.iter().position(|mac| *mac == Some(client));
        let wanted = u32::from(wanted).wrapping_sub(u32::from(GUEST)) as usize;
        let free = |n: &usize| self.leases.get(*n) == Some(&None);
        let n = known
            .or_else(|| Some(wanted).filter(free))
            .or_else(|| (0..LEASES).find(free))?;
        self.leases[n] = Some(client);
        Some(Ipv4Addr::from(u32::from(GUEST) + n as u32))
    }

    /// A message from a client.
    pub fn message(&mut self, network: &mut Network, data: &[u8]) {
        let Ok(packet) = DhcpPacket::new_checked(data) else {
            return;
        };
        let Ok(request) = DhcpRepr::parse(&packet) else {
            return;
        };
        let Some((kind, address)) = self.decide(&request) else {
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
        answer(network, &request, address, &bytes);
    }

    /// What to answer, and the address that it is about.
    fn decide(&mut self, request: &DhcpRepr) -> Option<(DhcpMessageType, Ipv4Addr)> {
        let wanted = request.requested_ip.unwrap_or(request.client_ip);
        let address = self.lease(request.client_hardware_address, wanted)?;
        let ours = request
            .server_identifier
            .is_none_or(|server| server == GATEWAY);
        match request.message_type {
            DhcpMessageType::Discover => Some((DhcpMessageType::Offer, address)),
            DhcpMessageType::Request if !ours => None,
            DhcpMessageType::Request if wanted == address => Some((DhcpMessageType::Ack, address)),
            DhcpMessageType::Request => Some((DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED)),
            DhcpMessageType::Inform => Some((DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED)),
            _ => None,
        }
    }
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
fn answer(network: &mut Network, request: &DhcpRepr, address: Ipv4Addr, bytes: &[u8]) {
    let configured = !request.client_ip.is_unspecified() && !address.is_unspecified();
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
        assert_eq!(dhcp.lease(client(1), nothing), Some(address(15)));
        assert_eq!(dhcp.lease(client(2), nothing), Some(address(16)));
        assert_eq!(dhcp.lease(client(1), address(17)), Some(address(15)));
        assert_eq!(dhcp.lease(client(3), address(15)), Some(address(17)));
        // The second client comes to a new one first.
        let mut dhcp = Dhcp::default();
        assert_eq!(dhcp.lease(client(2), address(16)), Some(address(16)));
        assert_eq!(dhcp.lease(client(1), address(15)), Some(address(15)));
        for outside in [address(14), address(31), Ipv4Addr::BROADCAST] {
            assert_eq!(dhcp.lease(client(4), outside), Some(address(17)));
        }
        for n in 5..=17 {
            assert!(dhcp.lease(client(n), nothing).is_some());
        }
        assert_eq!(dhcp.lease(client(18), nothing), None, "all are taken");
    }
}
