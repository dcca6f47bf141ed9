from proto import *
# end to end rows: layers, lr
nl,lr=int(sys.argv[1]),float(sys.argv[2])
n=TOTAL/p1_cost(nl); print(nl,n/1e6)
p=phase1(nl,n,lr,perm,name=f'e2e{nl}'); torch.save(p,f'/tmp/q19/e2e{nl}_{lr}.pt'); log(what=f'e2e {nl} layers lr {lr}',nats=nats1(Trunk([p]),p))
